// Pins, and the removal of cached sets that nothing names.
#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "calib/store_private.h"

static const char suffix[] = ".safetensors";
enum { MAX_DEPTH = 16, STALE_SECONDS = 24 * 3600 };

// The cache's pins; an empty object when there are none.
static json_t *load_pins(const struct kvd_store_config *c, char path[KVD_STORE_PATH],
                         struct kvd_error *err)
{
    struct kvd_error local = {0};
    if (kvd_store_join(path, c->cache, "pins.json", err))
        return NULL;
    json_t *pins = kvd_store_load_json(path, &local);
    if (!pins && local.code == KVD_E_NOT_FOUND)
        return json_object();
    if (json_is_object(pins))
        return pins;
    json_decref(pins);
    kvd_fail(err, KVD_E_CORRUPT, "%s", *local.text ? local.text : "pins.json is no JSON object");
    return NULL;
}

int kvd_store_pin(const struct kvd_store_config *c, const char *ref, bool pinned,
                  char digest[KVD_DIGEST_TEXT], struct kvd_error *err)
{
    char path[KVD_STORE_PATH];
    struct kvd_rotset *set = NULL;
    if (kvd_store_join(path, c->cache, "pins.json", err) || kvd_store_make_parents(path, err))
        return err->code;
    // What is fetched stays until it is pinned, and two at once lose no pin.
    int lock KVD_CLOSE = kvd_store_lock(c->cache, err);
    if (lock < 0)
        return lock;
    if (kvd_digest_valid(ref) && !pinned) {
        snprintf(digest, KVD_DIGEST_TEXT, "%s", ref);
    } else {
        if (kvd_store_fetch(c, ref, NULL, NULL, &set, NULL, err))
            return err->code;
        snprintf(digest, KVD_DIGEST_TEXT, "%s", set->digest);
        kvd_rotset_free(&set);
    }
    json_t *pins = load_pins(c, path, err);
    if (!pins)
        return err->code;
    if (pinned)
        json_object_set_new(pins, digest, json_string(ref));
    else
        json_object_del(pins, digest);
    int rc = kvd_store_write_json(pins, path, err);
    json_decref(pins);
    return rc;
}

// Adds the digests that manifests in a folder, and in those below, name.
static int add_named(const char *folder, int depth, json_t *named, struct kvd_error *err)
{
    DIR *d = opendir(folder);
    if (!d)
        return errno == ENOENT ? KVD_OK : kvd_fail(err, -errno, "%s: %s", folder, strerror(errno));
    int rc = KVD_OK;
    for (struct dirent *e; rc == KVD_OK && (e = readdir(d));) {
        char path[KVD_STORE_PATH];
        struct stat st;
        if (*e->d_name == '.' || kvd_store_join(path, folder, e->d_name, NULL) || lstat(path, &st))
            continue;
        size_t n = strlen(e->d_name);
        if (S_ISDIR(st.st_mode) && depth < MAX_DEPTH) {
            rc = add_named(path, depth + 1, named, err);
        } else if (n > 5 && strcmp(e->d_name + n - 5, ".json") == 0) {
            json_t *manifest = kvd_store_load_json(path, err), *entry;
            json_t *tags = json_object_get(manifest, "tags");
            const char *tag;
            if (!manifest)
                rc = err->code;
            else if (!json_is_object(tags))
                rc = kvd_fail(err, KVD_E_CORRUPT, "%s: a manifest without tags", path);
            json_object_foreach(tags, tag, entry)
            {
                const char *digest = json_string_value(json_object_get(entry, "digest"));
                if (digest)
                    json_object_set_new(named, digest, json_true());
            }
            json_decref(manifest);
        }
    }
    closedir(d);
    return rc;
}

static int add_named_of(void *named, const char *folder, const char *url, struct kvd_error *err)
{
    char models[KVD_STORE_PATH];
    (void)url;
    if (kvd_store_join(models, folder, "models", err))
        return err->code;
    return add_named(models, 0, named, err);
}

// A file of objects/sha256: whether it is to go.
static bool unwanted(const char *name, const struct stat *st, const json_t *named,
                     struct kvd_store_gc *out)
{
    size_t n = strlen(name);
    bool object = n > 64 && strcmp(name + 64, suffix) == 0;
    if (object || (n > 64 && strcmp(name + 64, ".sig") == 0)) {
        char digest[KVD_DIGEST_TEXT];
        snprintf(digest, sizeof(digest), "sha256:%.64s", name);
        if (json_object_get(named, digest)) {
            out->kept += object;
            return false;
        }
        out->removed += object;
        return true;
    }
    return strstr(name, suffix) && time(NULL) - st->st_mtime > STALE_SECONDS;
}

int kvd_store_collect(const struct kvd_store_config *c, bool dry, struct kvd_store_gc *out,
                      struct kvd_error *err)
{
    char objects[KVD_STORE_PATH], path[KVD_STORE_PATH];
    *out = (struct kvd_store_gc){0};
    if (kvd_store_join(objects, c->cache, "objects/sha256", err))
        return err->code;
    if (access(c->cache, F_OK) && errno == ENOENT)
        return KVD_OK;
    int lock KVD_CLOSE = kvd_store_lock(c->cache, err);
    if (lock < 0)
        return lock;
    json_t *named = load_pins(c, path, err);
    if (!named)
        return err->code;
    int rc = kvd_store_each(c->cache, add_named_of, named, err);
    DIR *d = rc ? NULL : opendir(objects);
    if (!rc && !d && errno != ENOENT)
        rc = kvd_fail(err, -errno, "%s: %s", objects, strerror(errno));
    for (struct dirent *e; d && rc == KVD_OK && (e = readdir(d));) {
        struct stat st;
        if (kvd_store_join(path, objects, e->d_name, NULL) || lstat(path, &st) ||
            !S_ISREG(st.st_mode) || !unwanted(e->d_name, &st, named, out))
            continue;
        out->freed += (uint64_t)st.st_size;
        if (!dry && unlink(path) && errno != ENOENT)
            rc = kvd_fail(err, -errno, "%s: %s", path, strerror(errno));
    }
    if (d)
        closedir(d);
    json_decref(named);
    return rc;
}

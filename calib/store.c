#include "calib/store_private.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "calib/safetensors.h"
#include "calib/sign.h"
#include "calib/transfer.h"

enum { MAX_MANIFEST = 1 << 20, MAX_DEPTH = 16 };

// What a file of a store is.
enum kind { MANIFEST, SET, SIGNATURE };

// A model or tag: parts of [A-Za-z0-9._-] that do not begin with a dot.
static bool word_valid(const char *text, size_t n, bool slashes)
{
    bool start = true;
    if (n == 0 || n > KVD_MAX_NAME)
        return false;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (c == '/' ? !slashes || start : !isalnum((unsigned char)c) && !strchr("._-", c))
            return false;
        if (start && c == '.')
            return false;
        start = c == '/';
    }
    return !start;
}

// Splits "model@tag".
static bool split_ref(const char *ref, char model[KVD_MAX_NAME + 1], char tag[KVD_MAX_NAME + 1])
{
    const char *at = strchr(ref, '@');
    if (!at || !word_valid(ref, (size_t)(at - ref), true) ||
        !word_valid(at + 1, strlen(at + 1), false))
        return false;
    snprintf(model, KVD_MAX_NAME + 1, "%.*s", (int)(at - ref), ref);
    snprintf(tag, KVD_MAX_NAME + 1, "%s", at + 1);
    return true;
}

bool kvd_store_ref_valid(const char *ref)
{
    char model[KVD_MAX_NAME + 1], tag[KVD_MAX_NAME + 1];
    return kvd_digest_valid(ref) || split_ref(ref, model, tag);
}

const char *kvd_store_option(const struct kvd_store_config *c)
{
    return c->option ? c->option : "store in kvd.conf, or --store of kvd";
}

int kvd_store_make_parents(const char *path, struct kvd_error *err)
{
    char dir[KVD_STORE_PATH];
    if ((size_t)snprintf(dir, sizeof(dir), "%s", path) >= sizeof(dir))
        return kvd_fail(err, KVD_E_INVALID, "%s: path too long", path);
    for (char *c = dir + 1; *c; c++) {
        if (*c != '/')
            continue;
        *c = '\0';
        if (mkdir(dir, 0755) && errno != EEXIST)
            return kvd_fail(err, -errno, "cannot make the folder %s: %s", dir, strerror(errno));
        *c = '/';
    }
    return KVD_OK;
}

int kvd_store_join(char out[KVD_STORE_PATH], const char *base, const char *rest,
                   struct kvd_error *err)
{
    size_t n = strlen(base);
    while (n > 1 && base[n - 1] == '/')
        n--;
    if (snprintf(out, KVD_STORE_PATH, "%.*s/%s", (int)n, base, rest) >= KVD_STORE_PATH)
        return kvd_fail(err, KVD_E_INVALID, "%s/%s: path too long", base, rest);
    return KVD_OK;
}

int kvd_store_signature_name(char *out, size_t cap, const char *digest)
{
    return snprintf(out, cap, "objects/sha256/%s.sig", digest + 7);
}

int kvd_store_object_name(char *out, size_t cap, const char *digest)
{
    return snprintf(out, cap, "objects/sha256/%s.safetensors", digest + 7);
}

json_t *kvd_store_load_json(const char *path, struct kvd_error *err)
{
    struct stat st;
    json_error_t je;
    if (stat(path, &st)) {
        kvd_fail(err, KVD_E_NOT_FOUND, "%s: %s", path, strerror(errno));
        return NULL;
    }
    json_t *j =
        st.st_size <= MAX_MANIFEST ? json_load_file(path, JSON_REJECT_DUPLICATES, &je) : NULL;
    if (!j)
        kvd_fail(err, KVD_E_CORRUPT, "%s: %s", path,
                 st.st_size > MAX_MANIFEST ? "too large" : je.text);
    return j;
}

// What arrived must make sense before it replaces what the cache has: a digest names bytes, a name
// not even that.
static int inspect(const char *path, enum kind kind, const char *url, struct kvd_error *err)
{
    struct stat st;
    struct kvd_error local = {0};
    bool ok;
    if (kind == SIGNATURE) {
        ok = stat(path, &st) == 0 && st.st_size == KVD_SIGNATURE_BYTES;
        if (!ok)
            kvd_fail(&local, KVD_E_CORRUPT, "a signature has %d bytes", KVD_SIGNATURE_BYTES);
    } else if (kind == SET) {
        struct kvd_rotset *set = kvd_rotset_read(path, &local);
        ok = set;
        kvd_rotset_free(&set);
    } else {
        json_t *j = kvd_store_load_json(path, &local);
        ok = j;
        json_decref(j);
    }
    return ok ? KVD_OK : kvd_fail(err, KVD_E_CORRUPT, "%s was not kept: %s", url, local.text);
}

// Where a file of a store is in the cache: manifests by store, what a digest names for all.
static int cached_path(const struct kvd_store_config *c, enum kind kind, const char *name,
                       char out[KVD_STORE_PATH], struct kvd_error *err)
{
    char folder[KVD_STORE_PATH];
    if (kind != MANIFEST)
        return kvd_store_join(out, c->cache, name, err);
    if (kvd_store_folder(c, folder, err))
        return err ? err->code : KVD_E_INVALID;
    return kvd_store_join(out, folder, name, err);
}

// Fetches <store>/<name> to its place in the cache. The old file stays if anything fails.
static int mirror(const struct kvd_store_config *c, const char *name, enum kind kind, uint64_t max,
                  const char *digest, kvd_store_progress *progress, void *ctx,
                  struct kvd_error *err)
{
    char url[KVD_STORE_PATH], path[KVD_STORE_PATH], tmp[KVD_STORE_PATH + 8];
    if (!c->url || !*c->url)
        return kvd_fail(err, KVD_E_UNAVAILABLE,
                        "%s is not in the cache and no store is configured (%s)", name,
                        kvd_store_option(c));
    struct kvd_error local = {0};
    err = err ? err : &local;
    if (kvd_store_away(c->url))
        return kvd_fail(err, KVD_E_UNAVAILABLE, "the store %s is not there", c->url);
    if (kvd_store_join(url, c->url, name, err) || cached_path(c, kind, name, path, err) ||
        kvd_store_make_parents(path, err) || (kind == MANIFEST && kvd_store_make_folder(c, err)))
        return err->code;
    snprintf(tmp, sizeof(tmp), "%s.XXXXXX", path);
    int fd KVD_CLOSE = mkostemp(tmp, O_CLOEXEC);
    if (fd < 0)
        return kvd_fail(err, -errno, "cannot write to the cache: %s: %s", tmp, strerror(errno));
    struct kvd_transfer t = {.url = url,
                             .fd = fd,
                             .max_bytes = max,
                             .timeout_ms = c->timeout_ms ? c->timeout_ms : 60000,
                             .retries = c->retries,
                             .given_up = c->given_up,
                             .progress = progress,
                             .progress_ctx = ctx};
    int rc = kvd_transfer_run(&t, err);
    if (rc == KVD_OK && digest && strcmp(t.digest, digest) != 0)
        rc = kvd_fail(err, KVD_E_CORRUPT,
                      "%s has digest %s, not the one asked for; it was not kept", url, t.digest);
    if (rc == KVD_OK && (fchmod(fd, 0644) || fsync(fd)))
        rc = kvd_fail(err, -errno, "%s: %s", tmp, strerror(errno));
    if (rc == KVD_OK)
        rc = inspect(tmp, kind, url, err);
    if (rc == KVD_OK && rename(tmp, path))
        rc = kvd_fail(err, -errno, "%s: %s", path, strerror(errno));
    if (rc)
        unlink(tmp);
    return rc;
}

int kvd_store_tag_digest(const json_t *manifest, const char *model, const char *tag,
                         char digest[KVD_DIGEST_TEXT], struct kvd_error *err)
{
    const json_t *entry = json_object_get(json_object_get(manifest, "tags"), tag);
    const char *text = json_string_value(json_object_get(entry, "digest"));
    if (!entry)
        return kvd_fail(err, KVD_E_NOT_FOUND, "model %s has no tag %s in the store", model, tag);
    if (!text || !kvd_digest_valid(text))
        return kvd_fail(err, KVD_E_CORRUPT,
                        "the manifest of %s names a malformed digest for tag %s", model, tag);
    snprintf(digest, KVD_DIGEST_TEXT, "%s", text);
    return KVD_OK;
}

// Resolves model@tag. The store's manifest is asked first; the one cached of it answers when the
// store cannot. Without a store, all whose manifests are cached are asked.
static int resolve(const struct kvd_store_config *c, const char *ref, char digest[KVD_DIGEST_TEXT],
                   struct kvd_error *err)
{
    char model[KVD_MAX_NAME + 1], tag[KVD_MAX_NAME + 1], name[KVD_MAX_NAME + 16],
        path[KVD_STORE_PATH];
    if (kvd_digest_valid(ref)) {
        snprintf(digest, KVD_DIGEST_TEXT, "%s", ref);
        return KVD_OK;
    }
    if (!split_ref(ref, model, tag))
        return kvd_fail(
            err, KVD_E_INVALID,
            "%.200s is no rotation set: say model@tag, sha256:<hex>, hadamard, random or identity",
            ref);
    if (!c->url || !*c->url)
        return kvd_store_resolve_cached(c, model, tag, digest, err);
    snprintf(name, sizeof(name), "models/%s.json", model);
    struct kvd_error remote = {0};
    int rc = mirror(c, name, MANIFEST, MAX_MANIFEST, NULL, NULL, NULL, &remote);
    if (rc == KVD_E_NOT_FOUND)
        return kvd_fail(err, rc, "the store has no model %s", model);
    if (cached_path(c, MANIFEST, name, path, err))
        return err->code;
    json_t *manifest = kvd_store_load_json(path, err);
    if (!manifest)
        return rc ? kvd_fail(err, rc, "%s", remote.text) : err->code;
    rc = kvd_store_tag_digest(manifest, model, tag, digest, err);
    json_decref(manifest);
    return rc;
}

// The signature in the cache; if it is not there or not good, the store's.
static int check_signature(const struct kvd_store_config *c, const char *digest,
                           struct kvd_error *err)
{
    char name[128], path[KVD_STORE_PATH];
    uint8_t signature[KVD_SIGNATURE_BYTES];
    if (!c->public_key || !*c->public_key)
        return KVD_OK;
    kvd_store_signature_name(name, sizeof(name), digest);
    if (kvd_store_join(path, c->cache, name, err))
        return KVD_E_INVALID;
    for (int fetched = 0; fetched < 2; fetched++) {
        if (fetched && mirror(c, name, SIGNATURE, KVD_SIGNATURE_BYTES, NULL, NULL, NULL, err))
            return err->code == KVD_E_NOT_FOUND
                       ? kvd_fail(err, KVD_E_DENIED,
                                  "%s is not signed, and only sets signed by %s are taken", digest,
                                  c->public_key)
                       : err->code;
        int fd KVD_CLOSE = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t n = fd < 0 ? 0 : read(fd, signature, sizeof(signature));
        if (n == sizeof(signature) &&
            kvd_sign_verify(c->public_key, digest, signature, sizeof(signature), err) == KVD_OK)
            return KVD_OK;
    }
    unlink(path);
    return err->code ? err->code : kvd_fail(err, KVD_E_DENIED, "%s: unreadable signature", digest);
}

int kvd_store_fetch(const struct kvd_store_config *c, const char *ref, kvd_store_progress *progress,
                    void *ctx, struct kvd_rotset **out, enum kvd_store_source *source,
                    struct kvd_error *err)
{
    char digest[KVD_DIGEST_TEXT], name[128], path[KVD_STORE_PATH];
    struct kvd_error local = {0};
    err = err ? err : &local;
    int rc = resolve(c, ref, digest, err);
    if (rc)
        return rc;
    kvd_store_object_name(name, sizeof(name), digest);
    if (kvd_store_join(path, c->cache, name, err))
        return KVD_E_INVALID;
    struct kvd_rotset *set = NULL;
    bool remote = access(path, R_OK) != 0;
    if (!remote) {
        set = kvd_rotset_read(path, err);
        if (!set || strcmp(set->digest, digest) != 0) {
            // The cached copy is damaged: fetch it again rather than fail.
            kvd_rotset_free(&set);
            remote = true;
        }
    }
    if (remote) {
        rc = mirror(c, name, SET, KVD_ROTSET_MAX_BYTES, digest, progress, ctx, err);
        if (rc)
            return rc;
        set = kvd_rotset_read(path, err);
        if (!set)
            return err->code;
    }
    if (check_signature(c, digest, err)) {
        kvd_rotset_free(&set);
        return err->code;
    }
    if (strchr(ref, '@')) // what the store calls the model, whatever the file does
        snprintf(set->model, sizeof(set->model), "%.*s", (int)strcspn(ref, "@"), ref);
    *out = set;
    if (source)
        *source = remote ? KVD_STORE_REMOTE : KVD_STORE_CACHE;
    return KVD_OK;
}

struct listing {
    const struct kvd_store_config *c;
    bool refresh; // manifests are fetched again
    struct kvd_store_entry *entries;
    uint32_t n, cap;
};

static double evaluated(const json_t *info, const char *mode)
{
    const json_t *figures = json_object_get(json_object_get(info, "evaluation"), mode);
    return json_number_value(json_object_get(figures, "output_error"));
}

static int add_entry(struct listing *l, const char *model, const char *tag, const json_t *info)
{
    if (l->n == l->cap) {
        uint32_t cap = l->cap ? 2 * l->cap : 16;
        struct kvd_store_entry *grown = realloc(l->entries, cap * sizeof(*grown));
        if (!grown)
            return KVD_E_INTERNAL;
        l->entries = grown;
        l->cap = cap;
    }
    struct kvd_store_entry *e = &l->entries[l->n];
    *e = (struct kvd_store_entry){0};
    const char *digest = json_string_value(json_object_get(info, "digest"));
    if (!digest || !kvd_digest_valid(digest) || !word_valid(tag, strlen(tag), false))
        return KVD_OK;
    snprintf(e->model, sizeof(e->model), "%s", model);
    snprintf(e->tag, sizeof(e->tag), "%s", tag);
    snprintf(e->digest, sizeof(e->digest), "%s", digest);
    e->bytes = (uint64_t)json_integer_value(json_object_get(info, "bytes"));
    e->error = evaluated(info, "windows");
    e->error_no_windows = evaluated(info, "no_windows");
    for (uint32_t i = 0; i < l->n; i++) // of another store, and the same there
        if (strcmp(e->digest, l->entries[i].digest) == 0 && strcmp(tag, l->entries[i].tag) == 0 &&
            strcmp(model, l->entries[i].model) == 0)
            return KVD_OK;
    char name[128], path[KVD_STORE_PATH];
    kvd_store_object_name(name, sizeof(name), digest);
    e->cached = kvd_store_join(path, l->c->cache, name, NULL) == 0 && access(path, R_OK) == 0;
    l->n++;
    return KVD_OK;
}

// Adds the tags of a model's manifest in `folder`, once it is fetched again if `refresh`.
static void add_model(struct listing *l, const char *folder, const char *model, bool refresh)
{
    char name[KVD_MAX_NAME + 16], path[KVD_STORE_PATH];
    if (!word_valid(model, strlen(model), true))
        return;
    snprintf(name, sizeof(name), "models/%s.json", model);
    if (refresh)
        mirror(l->c, name, MANIFEST, MAX_MANIFEST, NULL, NULL, NULL, NULL);
    json_t *manifest =
        kvd_store_join(path, folder, name, NULL) ? NULL : kvd_store_load_json(path, NULL);
    const char *tag;
    json_t *info;
    json_object_foreach(json_object_get(manifest, "tags"), tag, info)
        add_entry(l, model, tag, info);
    json_decref(manifest);
}

// Adds those of all manifests below models/ in `folder`; `prefix` ends with a slash or is empty.
static void add_models(struct listing *l, const char *folder, const char *prefix, int depth)
{
    char below[KVD_MAX_NAME + 16], path[KVD_STORE_PATH], name[KVD_MAX_NAME + 2];
    snprintf(below, sizeof(below), "models/%s", prefix);
    DIR *d = kvd_store_join(path, folder, below, NULL) ? NULL : opendir(path);
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat st;
        size_t n = strlen(e->d_name);
        if (*e->d_name == '.' || fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW))
            continue;
        bool inner = S_ISDIR(st.st_mode), manifest = n > 5 && !strcmp(e->d_name + n - 5, ".json");
        int end = (int)(inner ? n : n - 5);
        if ((!inner && !manifest) || (size_t)snprintf(name, sizeof(name), "%s%.*s%s", prefix, end,
                                                      e->d_name, inner ? "/" : "") >= sizeof(name))
            continue;
        if (!inner)
            add_model(l, folder, name, false);
        else if (depth < MAX_DEPTH)
            add_models(l, folder, name, depth + 1);
    }
    if (d)
        closedir(d);
}

static int add_folder(void *ctx, const char *folder, const char *url, struct kvd_error *err)
{
    struct listing *l = ctx;
    char path[KVD_STORE_PATH];
    (void)url;
    if (kvd_store_join(path, folder, "index.json", err))
        return err->code;
    json_t *index = kvd_store_load_json(path, NULL), *model;
    size_t i;
    json_array_foreach(json_object_get(index, "models"), i, model) if (json_is_string(model))
        add_model(l, folder, json_string_value(model), l->refresh);
    json_decref(index);
    if (!l->refresh) // what was fetched by name is in no index of a cache
        add_models(l, folder, "", 0);
    return KVD_OK;
}

int kvd_store_list(const struct kvd_store_config *c, struct kvd_store_entry **entries, uint32_t *n,
                   struct kvd_error *err)
{
    struct listing l = {.c = c};
    char folder[KVD_STORE_PATH];
    struct kvd_error remote = {0};
    bool store = c->url && *c->url;
    int rc = KVD_OK, missing = KVD_OK;
    if (store) {
        missing = mirror(c, "index.json", MANIFEST, MAX_MANIFEST, NULL, NULL, NULL, &remote);
        l.refresh = missing == KVD_OK;
        rc = kvd_store_folder(c, folder, err);
    }
    if (rc == KVD_OK)
        rc = store ? add_folder(&l, folder, c->url, err)
                   : kvd_store_each(c->cache, add_folder, &l, err);
    if (rc == KVD_OK && missing && l.n == 0)
        rc = kvd_fail(err, missing, "%s", remote.text);
    if (rc) {
        free(l.entries);
        return rc;
    }
    *entries = l.entries;
    *n = l.n;
    return KVD_OK;
}

int kvd_store_write_json(json_t *j, const char *path, struct kvd_error *err)
{
    char tmp[KVD_STORE_PATH + 8];
    snprintf(tmp, sizeof(tmp), "%s.new", path);
    if (json_dump_file(j, tmp, JSON_INDENT(2) | JSON_SORT_KEYS) || rename(tmp, path)) {
        int e = errno;
        unlink(tmp);
        return kvd_fail(err, -e, "%s: %s", path, strerror(e));
    }
    return KVD_OK;
}

// Manifests of the cache, which are kept by store: what a tag names differs from one to another.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "calib/safetensors.h"
#include "calib/store_private.h"

enum { URL_BYTES = 4096 };

int kvd_store_lock(const char *directory, struct kvd_error *err)
{
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    while (fd >= 0 && flock(fd, LOCK_EX))
        if (errno != EINTR) {
            int e = errno;
            close(fd);
            return kvd_fail(err, -e, "%s: cannot lock the folder: %s", directory, strerror(e));
        }
    return fd >= 0 ? fd : kvd_fail(err, -errno, "%s: %s", directory, strerror(errno));
}

// The path of a store that is a folder; NULL of others.
static const char *folder_of(const char *url)
{
    return strncmp(url, "file://", 7) == 0 ? url + 7 : *url == '/' ? url : NULL;
}

bool kvd_store_away(const char *url)
{
    const char *folder = folder_of(url);
    return folder && access(folder, F_OK) != 0;
}

// One text for the ways to write a store's URL.
static void canonical(const char *url, char out[URL_BYTES])
{
    const char *folder = folder_of(url);
    size_t n = (size_t)snprintf(out, URL_BYTES, "%s", folder ? folder : url);
    for (n = KVD_MIN(n, (size_t)URL_BYTES - 1); n > 1 && out[n - 1] == '/'; n--)
        out[n - 1] = '\0';
}

int kvd_store_folder(const struct kvd_store_config *c, char out[KVD_STORE_PATH],
                     struct kvd_error *err)
{
    char url[URL_BYTES], digest[KVD_DIGEST_TEXT], name[64];
    canonical(c->url, url);
    kvd_digest(url, strlen(url), digest);
    snprintf(name, sizeof(name), "stores/%.32s", digest + 7);
    return kvd_store_join(out, c->cache, name, err);
}

int kvd_store_make_folder(const struct kvd_store_config *c, struct kvd_error *err)
{
    char folder[KVD_STORE_PATH], path[KVD_STORE_PATH], url[URL_BYTES];
    if (kvd_store_folder(c, folder, err) || kvd_store_join(path, folder, "objects", err) ||
        kvd_store_make_parents(path, err))
        return err->code;
    // So that the folder can be served as a store itself.
    if (symlink("../../objects", path) && errno != EEXIST)
        return kvd_fail(err, -errno, "%s: %s", path, strerror(errno));
    if (kvd_store_join(path, folder, "url", err))
        return err->code;
    canonical(c->url, url);
    return access(path, F_OK) == 0 ? KVD_OK
                                   : kvd_write_file(path, (const uint8_t *)url, strlen(url), err);
}

// What a folder below stores/ says it was fetched from: text for people.
static void read_url(const char *folder, char out[URL_BYTES])
{
    char path[KVD_STORE_PATH];
    int fd KVD_CLOSE =
        kvd_store_join(path, folder, "url", NULL) ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, out, URL_BYTES - 1);
    out[n < 0 ? 0 : n] = '\0';
    for (char *at = out; *at; at++)
        if (*at < ' ' || *at > '~')
            *at = '?';
    if (!*out)
        snprintf(out, URL_BYTES, "%s", folder);
}

int kvd_store_each(const char *cache, kvd_store_visit *visit, void *ctx, struct kvd_error *err)
{
    char stores[KVD_STORE_PATH], folder[KVD_STORE_PATH], url[URL_BYTES];
    if (kvd_store_join(stores, cache, "stores", err))
        return err->code;
    int rc = visit(ctx, cache, cache, err); // it may be a store itself
    DIR *d = rc ? NULL : opendir(stores);
    if (!rc && !d && errno != ENOENT)
        return kvd_fail(err, -errno, "%s: %s", stores, strerror(errno));
    for (struct dirent *e; d && rc == KVD_OK && (e = readdir(d));) {
        if (*e->d_name == '.' || kvd_store_join(folder, stores, e->d_name, NULL))
            continue;
        read_url(folder, url);
        rc = visit(ctx, folder, url, err);
    }
    if (d)
        closedir(d);
    return rc;
}

// What the stores of a cache say of a tag.
struct agreement {
    const char *model, *tag, *option;
    char manifest[KVD_MAX_NAME + 16];
    char digest[KVD_DIGEST_TEXT], by[256];
};

static int ask(void *ctx, const char *folder, const char *url, struct kvd_error *err)
{
    struct agreement *a = ctx;
    char path[KVD_STORE_PATH], digest[KVD_DIGEST_TEXT];
    struct kvd_error local = {0};
    if (kvd_store_join(path, folder, a->manifest, err))
        return err->code;
    json_t *manifest = kvd_store_load_json(path, &local);
    if (!manifest) // that of a store that says nothing of the model is not there
        return local.code == KVD_E_NOT_FOUND ? KVD_OK : kvd_fail(err, local.code, "%s", local.text);
    int rc = kvd_store_tag_digest(manifest, a->model, a->tag, digest, &local);
    json_decref(manifest);
    if (rc)
        return rc == KVD_E_NOT_FOUND ? KVD_OK : kvd_fail(err, rc, "%s", local.text);
    if (!*a->digest) {
        snprintf(a->digest, sizeof(a->digest), "%s", digest);
        snprintf(a->by, sizeof(a->by), "%s", url);
    }
    return strcmp(a->digest, digest) == 0
               ? KVD_OK
               : kvd_fail(err, KVD_E_PRECONDITION,
                          "%s@%s is %s in %.200s, and %s in %.200s: name the store (%s), or the "
                          "set by its digest",
                          a->model, a->tag, a->digest, a->by, digest, url, a->option);
}

int kvd_store_resolve_cached(const struct kvd_store_config *c, const char *model, const char *tag,
                             char digest[KVD_DIGEST_TEXT], struct kvd_error *err)
{
    struct agreement a = {.model = model, .tag = tag, .option = kvd_store_option(c)};
    snprintf(a.manifest, sizeof(a.manifest), "models/%s.json", model);
    if (kvd_store_each(c->cache, ask, &a, err))
        return err->code;
    if (!*a.digest)
        return kvd_fail(err, KVD_E_UNAVAILABLE,
                        "%s@%s is not in the cache and no store is configured (%s)", model, tag,
                        a.option);
    snprintf(digest, KVD_DIGEST_TEXT, "%s", a.digest);
    return KVD_OK;
}

// Paths and JSON files of a store or cache: what store.c and gc.c share.
#ifndef KVD_CALIB_STORE_PRIVATE_H
#define KVD_CALIB_STORE_PRIVATE_H

#include <jansson.h>

#include "calib/store.h"

enum { KVD_STORE_PATH = 4096 };

// base/rest.
int kvd_store_join(char out[KVD_STORE_PATH], const char *base, const char *rest,
                   struct kvd_error *err);
// Where an object is, from a store's root.
int kvd_store_object_name(char *out, size_t cap, const char *digest);
// Where its signature is.
int kvd_store_signature_name(char *out, size_t cap, const char *digest);
// Locks a folder for changes of what lies in it until the descriptor that is returned is closed:
// whoever reads, changes and writes back does it under this. A negative code with *err set.
int kvd_store_lock(const char *directory, struct kvd_error *err);
// How a store is named to whoever lacks one.
const char *kvd_store_option(const struct kvd_store_config *c);
// Where the cache keeps the manifests of c->url: stores/<hash of the URL>.
int kvd_store_folder(const struct kvd_store_config *c, char out[KVD_STORE_PATH],
                     struct kvd_error *err);
// Makes that folder, with the URL in it for people.
int kvd_store_make_folder(const struct kvd_store_config *c, struct kvd_error *err);
// Calls visit for all folders of a cache that may hold manifests: itself, and those of its stores.
// url: printable. Ends with the first code that is not KVD_OK, and returns it.
typedef int kvd_store_visit(void *ctx, const char *folder, const char *url, struct kvd_error *err);
int kvd_store_each(const char *cache, kvd_store_visit *visit, void *ctx, struct kvd_error *err);
// What a tag is to all stores of the cache that know it. KVD_E_PRECONDITION: they do not agree.
int kvd_store_resolve_cached(const struct kvd_store_config *c, const char *model, const char *tag,
                             char digest[KVD_DIGEST_TEXT], struct kvd_error *err);
// What a tag is in a manifest. KVD_E_NOT_FOUND, KVD_E_CORRUPT.
int kvd_store_tag_digest(const json_t *manifest, const char *model, const char *tag,
                         char digest[KVD_DIGEST_TEXT], struct kvd_error *err);
// mkdir -p of the folder that holds `path`.
int kvd_store_make_parents(const char *path, struct kvd_error *err);
// NULL with KVD_E_NOT_FOUND or KVD_E_CORRUPT.
json_t *kvd_store_load_json(const char *path, struct kvd_error *err);
int kvd_store_write_json(json_t *j, const char *path, struct kvd_error *err);

#endif

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
// mkdir -p of the folder that holds `path`.
int kvd_store_make_parents(const char *path, struct kvd_error *err);
// NULL with KVD_E_NOT_FOUND or KVD_E_CORRUPT.
json_t *kvd_store_load_json(const char *path, struct kvd_error *err);
int kvd_store_write_json(json_t *j, const char *path, struct kvd_error *err);

#endif

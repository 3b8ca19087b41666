// safetensors files: an 8-byte header length, a JSON header, raw little-endian tensors. Reading
// trusts no number in the file; writing goes through a temporary beside the file.
#ifndef KVD_CALIB_SAFETENSORS_H
#define KVD_CALIB_SAFETENSORS_H

#include <jansson.h>

#include "proto/base.h"

enum kvd_tensor_type {
    KVD_TENSOR_F16,
    KVD_TENSOR_BF16,
    KVD_TENSOR_F32,
    KVD_TENSOR_F64,
    KVD_TENSOR_OTHER, // may stand in a file, but is not read
};

enum { KVD_TENSOR_RANK = 4, KVD_TENSOR_NAME = 96 };

struct kvd_safetensor {
    char name[KVD_TENSOR_NAME]; // longer names are cut: they are nobody's here
    enum kvd_tensor_type type;
    uint32_t rank;
    uint64_t shape[KVD_TENSOR_RANK]; // of rank at most KVD_TENSOR_RANK; others have type OTHER
    uint64_t at, bytes;              // in the file; within its size
};

struct kvd_safetensors {
    struct kvd_safetensor *tensors;
    uint32_t n;
    uint64_t data_at; // where the header ends
    json_t *header;
};

uint32_t kvd_tensor_type_size(enum kvd_tensor_type type);

// What the first eight bytes say.
uint64_t kvd_safetensors_header_length(const uint8_t file[8]);

// Parses the beginning of a file of `size` bytes, of which `have` are there. KVD_E_CORRUPT says
// what is wrong with `path`. *out is to be freed with kvd_safetensors_free.
int kvd_safetensors_parse(const char *path, const uint8_t *file, size_t have, uint64_t size,
                          struct kvd_safetensors *out, struct kvd_error *err);
// Reads the header of an open file.
int kvd_safetensors_read(const char *path, int fd, uint64_t size, struct kvd_safetensors *out,
                         struct kvd_error *err);
void kvd_safetensors_free(struct kvd_safetensors *s);

// NULL when there is none.
const struct kvd_safetensor *kvd_safetensors_find(const struct kvd_safetensors *s,
                                                  const char *name);
// A metadata string; NULL when there is none.
const char *kvd_safetensors_metadata(const struct kvd_safetensors *s, const char *key);

// What to write: `data` has the bytes of the shape.
struct kvd_tensor_source {
    const char *name;
    enum kvd_tensor_type type; // F32 or F64
    uint32_t rank;
    uint64_t shape[KVD_TENSOR_RANK];
    const void *data;
};

// The whole file in memory, the caller's to free; NULL when out of memory. `metadata` (strings) is
// stolen. If `payload` is not NULL, metadata gets it with the SHA-256 of the tensors.
uint8_t *kvd_safetensors_render(const struct kvd_tensor_source *tensors, uint32_t n,
                                json_t *metadata, const char *payload, size_t *size);

// Reads bytes [at, at + bytes) of an open file. KVD_E_CORRUPT when it ends before, or a negative
// errno.
int kvd_read_at(const char *path, int fd, void *to, size_t bytes, uint64_t at,
                struct kvd_error *err);

// Writes a file so that it is there whole or not at all.
int kvd_write_file(const char *path, const void *data, size_t size, struct kvd_error *err);

#endif

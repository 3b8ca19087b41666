// A file of torch.save: a zip whose entries are stored as they are, one pickle and the raw bytes of
// each storage. Nothing in it is executed (pickle.h).
#ifndef KVD_CALIB_TORCH_FILE_H
#define KVD_CALIB_TORCH_FILE_H

#include <zip.h>

#include "calib/pickle.h"

struct kvd_torch {
    zip_t *zip;
    char prefix[256]; // folder inside the zip, with its slash
    struct kvd_pickle *pickle;
    const char *path; // the caller's
};

enum { KVD_TORCH_ENTRY = 32 };

uint32_t kvd_torch_element_bytes(enum kvd_pickle_element element);

// Opens a file and reads its pickle. To be closed in any case. KVD_E_NOT_FOUND, KVD_E_CORRUPT,
// KVD_E_LIMIT.
int kvd_torch_open(struct kvd_torch *t, const char *path, struct kvd_error *err);
void kvd_torch_close(struct kvd_torch *t);

// The name of the entry that has a tensor's storage. KVD_E_CORRUPT.
int kvd_torch_storage(const struct kvd_torch *t, const struct kvd_pickle_value *tensor,
                      char name[KVD_TORCH_ENTRY], struct kvd_error *err);
// How many bytes an entry has. KVD_E_CORRUPT: there is none, or it is compressed.
int kvd_torch_entry_size(const struct kvd_torch *t, const char *name, uint64_t *size,
                         struct kvd_error *err);
// A whole entry of at most `max` bytes, compared with its checksum. The caller's to free; NULL with
// KVD_E_CORRUPT or KVD_E_LIMIT.
uint8_t *kvd_torch_entry(const struct kvd_torch *t, const char *name, uint64_t max, uint64_t *size,
                         struct kvd_error *err);
// Bytes of an entry of an open file, which is closed. KVD_E_CORRUPT.
int kvd_torch_read_at(const char *path, int fd, const char *name, void *to, uint64_t bytes,
                      uint64_t at, struct kvd_error *err);

#endif

// Random names that cannot be guessed, and files that hold a secret. Any thread.
#ifndef KVD_DAEMON_SECRET_H
#define KVD_DAEMON_SECRET_H

#include "proto/base.h"

enum {
    KVD_SECRET_TEXT = 33, // 16 random bytes in hex, and a NUL
    KVD_SECRET_FILE_MAX = 1024,
};

void kvd_secret_new(char out[KVD_SECRET_TEXT]);
// Whether a text is that secret. How long it takes says nothing of where they differ.
bool kvd_secret_same(const char secret[KVD_SECRET_TEXT], const char *text);
uint64_t kvd_random64(void);

// Reads a file of `least` to KVD_SECRET_FILE_MAX bytes that others can neither read nor write, and
// that only root or this user owns. KVD_E_DENIED, KVD_E_INVALID, or a negative errno.
int kvd_secret_file_read(const char *path, size_t least, uint8_t out[KVD_SECRET_FILE_MAX],
                         size_t *n, struct kvd_error *err);

#endif

// Random names that cannot be guessed. Any thread.
#ifndef KVD_DAEMON_SECRET_H
#define KVD_DAEMON_SECRET_H

#include <stdbool.h>
#include <stdint.h>

enum { KVD_SECRET_TEXT = 33 }; // 16 random bytes in hex, and a NUL

void kvd_secret_new(char out[KVD_SECRET_TEXT]);
// Whether a text is that secret. How long it takes says nothing of where they differ.
bool kvd_secret_same(const char secret[KVD_SECRET_TEXT], const char *text);
uint64_t kvd_random64(void);

#endif

// Random names that cannot be guessed. Any thread.
#ifndef KVD_DAEMON_SECRET_H
#define KVD_DAEMON_SECRET_H

#include <stdint.h>

enum { KVD_SECRET_TEXT = 33 }; // 16 random bytes in hex, and a NUL

void kvd_secret_new(char out[KVD_SECRET_TEXT]);
uint64_t kvd_random64(void);

#endif

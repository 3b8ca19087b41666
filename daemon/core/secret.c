#include "daemon/core/secret.h"

#include <sys/random.h>

#include "proto/base.h"

static void fill(void *out, size_t n)
{
    uint8_t *bytes = out;
    for (size_t have = 0; have < n;) {
        ssize_t got = getrandom(bytes + have, n - have, 0);
        have += got > 0 ? (size_t)got : 0;
    }
}

void kvd_secret_new(char out[KVD_SECRET_TEXT])
{
    uint8_t bytes[16];
    fill(bytes, sizeof(bytes));
    kvd_hex(bytes, sizeof(bytes), out);
}

uint64_t kvd_random64(void)
{
    uint64_t value;
    fill(&value, sizeof(value));
    return value;
}

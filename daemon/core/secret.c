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

bool kvd_secret_same(const char secret[KVD_SECRET_TEXT], const char *text)
{
    uint8_t differs = 0;
    if (strlen(text) != KVD_SECRET_TEXT - 1)
        return false;
    for (size_t i = 0; i < KVD_SECRET_TEXT - 1; i++)
        differs |= (uint8_t)(secret[i] ^ text[i]);
    return differs == 0;
}

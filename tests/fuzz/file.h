// A file in memory that functions which take a path can open.
#ifndef KVD_TESTS_FUZZ_FILE_H
#define KVD_TESTS_FUZZ_FILE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct fuzz_file {
    int fd;
    char path[64];
};

static inline void fuzz_write(struct fuzz_file *f, const void *data, size_t size)
{
    const uint8_t *at = data;
    while (size > 0) {
        ssize_t n = write(f->fd, at, size);
        if (n <= 0)
            abort();
        at += n;
        size -= (size_t)n;
    }
}

// Empties the file, which is made if it was not: *f is zero at first.
static inline void fuzz_rewind(struct fuzz_file *f)
{
    if (!f->path[0]) {
        f->fd = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(f->path, sizeof(f->path), "/proc/self/fd/%d", f->fd);
    }
    if (f->fd < 0 || ftruncate(f->fd, 0) || lseek(f->fd, 0, SEEK_SET))
        abort();
}

// As many bytes as a Hadamard matrix of 64 rows repeated has: orthogonal wherever a file says that
// matrices of that size are.
static inline void fuzz_fill_orthogonal(float *to, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] = __builtin_parity((unsigned)(i % 64 & i / 64 % 64)) ? -0.125f : 0.125f;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif

// Extents of the CPU backend: a memfd each, mapped side by side.
//
// The seals that keep other processes from writing go on with the first export. From then on the
// kernel refuses to punch holes too, so an exported extent is replaced, never zeroed.
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "kernels/cpu/cpu.h"

struct arena {
    struct kvd_arena base;
    int *fds; // per extent; -1: none, or imported
};

static struct arena *arena_of(struct kvd_arena *a)
{
    return (struct arena *)a;
}

static void *place(const struct kvd_arena *a, uint32_t i)
{
    return (void *)(uintptr_t)(a->base + i * a->bytes);
}

// Addresses without memory.
static void *reserve(void *at, uint64_t bytes)
{
    return mmap(at, bytes, PROT_NONE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0), -1, 0);
}

struct kvd_arena *kvd_cpu_arena_new(struct kvd_backend *b, uint32_t count, uint64_t bytes,
                                    struct kvd_error *err)
{
    (void)b;
    struct arena *a = calloc(1, sizeof(*a));
    int *fds = calloc(count, sizeof(*fds));
    void *base = a && fds ? reserve(NULL, count * bytes) : MAP_FAILED;
    if (base == MAP_FAILED) {
        kvd_fail(err, KVD_E_FULL, "cannot reserve addresses for %u extents of %llu bytes: %s",
                 count, (unsigned long long)bytes, strerror(errno));
        free(fds);
        free(a);
        return NULL;
    }
    memset(fds, 0xff, count * sizeof(*fds));
    *a = (struct arena){{(uint64_t)(uintptr_t)base, bytes, count}, fds};
    return &a->base;
}

void kvd_cpu_arena_free(struct kvd_backend *b, struct kvd_arena **ap)
{
    struct kvd_arena *a = KVD_TAKE(*ap);
    if (!a)
        return;
    for (uint32_t i = 0; i < a->count; i++)
        kvd_cpu_extent_drop(b, a, i);
    munmap(place(a, 0), a->count * a->bytes);
    free(arena_of(a)->fds);
    free(a);
}

int kvd_cpu_extent_make(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                        struct kvd_error *err)
{
    (void)b;
    // The new mapping takes the place of the old one, if any, in one step, and only if there is a
    // new one.
    int fd KVD_CLOSE = memfd_create("kvd-extent", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)a->bytes) ||
        mmap(place(a, i), a->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
            MAP_FAILED)
        return kvd_fail(err, errno == EMFILE || errno == ENFILE ? KVD_E_LIMIT : KVD_E_FULL,
                        "cannot make an extent of %llu bytes: %s%s", (unsigned long long)a->bytes,
                        strerror(errno),
                        errno == EMFILE ? "; raise extent-size or the limit of open files" : "");
    madvise(place(a, i), a->bytes, MADV_HUGEPAGE); // a hint; without it everything works
    if (arena_of(a)->fds[i] >= 0)
        close(arena_of(a)->fds[i]);
    arena_of(a)->fds[i] = KVD_TAKE_FD(fd);
    return KVD_OK;
}

void kvd_cpu_extent_drop(struct kvd_backend *b, struct kvd_arena *a, uint32_t i)
{
    (void)b;
    int *fd = &arena_of(a)->fds[i];
    reserve(place(a, i), a->bytes);
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

int kvd_cpu_extent_zero(struct kvd_backend *b, struct kvd_arena *a, uint32_t i,
                        struct kvd_error *err)
{
    (void)b;
    // A hole reads as zero: cheaper than writing, and the memory goes back.
    if (madvise(place(a, i), a->bytes, MADV_REMOVE))
        return kvd_fail(err, KVD_E_INTERNAL, "cannot zero an extent: %s", strerror(errno));
    return KVD_OK;
}

int kvd_cpu_extent_export(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int *fd,
                          struct kvd_error *err)
{
    (void)b;
    int own = arena_of(a)->fds[i];
    // Our mapping goes on writing; nobody can make another that writes.
    if (fcntl(own, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE) &&
        !(fcntl(own, F_GET_SEALS) & F_SEAL_FUTURE_WRITE))
        return kvd_fail(err, KVD_E_UNSUPPORTED,
                        "this kernel cannot share memory read-only (F_SEAL_FUTURE_WRITE: %s)",
                        strerror(errno));
    int copy = fcntl(own, F_DUPFD_CLOEXEC, 0);
    if (copy < 0)
        return kvd_fail(err, KVD_E_LIMIT, "cannot export an extent: %s", strerror(errno));
    *fd = copy;
    return KVD_OK;
}

int kvd_cpu_extent_import(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                          struct kvd_error *err)
{
    (void)b;
    struct stat st;
    if (fstat(fd, &st) || (uint64_t)st.st_size < a->bytes)
        return kvd_fail(err, KVD_E_INVALID, "extent %u has %lld bytes instead of %llu", i,
                        (long long)st.st_size, (unsigned long long)a->bytes);
    if (mmap(place(a, i), a->bytes, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
        return kvd_fail(err, KVD_E_FULL, "cannot map extent %u: %s", i, strerror(errno));
    madvise(place(a, i), a->bytes, MADV_HUGEPAGE);
    return KVD_OK;
}

int kvd_cpu_extent_descriptor(struct kvd_backend *b, struct kvd_arena *a, uint32_t i)
{
    (void)b;
    return arena_of(a)->fds[i];
}

// Copies what a file holds, holes aside, to memory that reads as zero.
static int copy_file(int fd, uint8_t *to, uint64_t bytes)
{
    off_t at = 0;
    while ((at = lseek(fd, at, SEEK_DATA)) >= 0 && (uint64_t)at < bytes) {
        off_t end = lseek(fd, at, SEEK_HOLE);
        end = end < 0 ? (off_t)bytes : KVD_MIN(end, (off_t)bytes);
        while (at < end) {
            ssize_t n = pread(fd, to + at, (size_t)(end - at), at);
            if (n <= 0)
                return KVD_E_INTERNAL;
            at += n;
        }
    }
    return at >= 0 || errno == ENXIO ? KVD_OK : KVD_E_INTERNAL; // ENXIO: no more data
}

int kvd_cpu_extent_adopt(struct kvd_backend *b, struct kvd_arena *a, uint32_t i, int fd,
                         bool *shared, struct kvd_error *err)
{
    struct stat st;
    *shared = false; // what was exported is sealed
    if (fstat(fd, &st) || (uint64_t)st.st_size != a->bytes)
        return kvd_fail(err, KVD_E_INVALID, "extent %u has %lld bytes instead of %llu", i,
                        (long long)st.st_size, (unsigned long long)a->bytes);
    if (fcntl(fd, F_GET_SEALS) & F_SEAL_FUTURE_WRITE) {
        int rc = kvd_cpu_extent_make(b, a, i, err);
        if (rc == KVD_OK && copy_file(fd, place(a, i), a->bytes))
            rc = kvd_fail(err, KVD_E_INTERNAL, "cannot copy extent %u: %s", i, strerror(errno));
        return rc;
    }
    int copy KVD_CLOSE = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0 || mmap(place(a, i), a->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                         copy, 0) == MAP_FAILED)
        return kvd_fail(err, copy < 0 ? KVD_E_LIMIT : KVD_E_FULL, "cannot map extent %u: %s", i,
                        strerror(errno));
    madvise(place(a, i), a->bytes, MADV_HUGEPAGE);
    if (arena_of(a)->fds[i] >= 0)
        close(arena_of(a)->fds[i]);
    arena_of(a)->fds[i] = KVD_TAKE_FD(copy);
    return KVD_OK;
}

static int no_gpu(struct kvd_error *err)
{
    return kvd_fail(err, KVD_E_UNSUPPORTED,
                    "kvd runs on the CPU and cannot reach GPU memory; register a memfd, or start "
                    "kvd with backend cuda");
}

int kvd_cpu_foreign_map(struct kvd_backend *b, const struct kvd_foreign *f, uint8_t **data,
                        struct kvd_error *err)
{
    (void)b;
    (void)f;
    (void)data;
    return no_gpu(err);
}

int kvd_cpu_segments_reserve(struct kvd_backend *b, uint64_t size, uint8_t **data,
                             struct kvd_error *err)
{
    (void)b;
    (void)size;
    (void)data;
    return no_gpu(err);
}

uint64_t kvd_cpu_memory_free(struct kvd_backend *b)
{
    (void)b;
    return UINT64_MAX;
}

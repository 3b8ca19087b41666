// A pool that outlives its process, with its prefix index, and a look at what the next process
// would find of it now.
#ifndef KVD_TESTS_LASTING_FIXTURE_H
#define KVD_TESTS_LASTING_FIXTURE_H

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/unit/blocks_fixture.h"

// What outlives a process: extents are never touched, and indices are held here.
static int index_fd[8] = {-1, -1, -1, -1, -1, -1, -1, -1};

static inline void index_kept(void *ctx, uint32_t ns, int fd)
{
    (void)ctx;
    if (index_fd[ns] >= 0)
        close(index_fd[ns]);
    index_fd[ns] = fd < 0 ? -1 : dup(fd);
}

static inline int index_find(void *ctx, uint32_t ns)
{
    (void)ctx;
    return index_fd[ns] < 0 ? -1 : dup(index_fd[ns]);
}

static inline int attach(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    (void)ctx;
    (void)bytes;
    *addr = (uint64_t)(index + 1) << 40;
    return 0;
}

static inline struct kvd_pool_mem_ops lasting_ops(struct test_mem *mem)
{
    return (struct kvd_pool_mem_ops){.ctx = mem,
                                     .alloc = test_mem_alloc,
                                     .free = test_mem_free,
                                     .zero = test_mem_zero,
                                     .attach = attach,
                                     .index_kept = index_kept,
                                     .index_find = index_find};
}

static const struct kvd_pool_config lasting = {.bytes = 16 << 21,
                                               .extent_bytes = 2 << 20,
                                               .max_sequences = 64,
                                               .max_namespaces = 8,
                                               .max_layouts = 8,
                                               .durable = true};

static inline int copy_of(int fd)
{
    struct stat st;
    int copy = memfd_create("copy", MFD_CLOEXEC);
    ck_assert_int_eq(fstat(fd, &st), 0);
    ck_assert_int_eq(ftruncate(copy, st.st_size), 0);
    for (off_t from = 0, to; (from = lseek(fd, from, SEEK_DATA)) >= 0; from = to) {
        static uint8_t bytes[1 << 20];
        to = KVD_MIN(lseek(fd, from, SEEK_HOLE), from + (off_t)sizeof(bytes));
        ck_assert_int_eq(pread(fd, bytes, (size_t)(to - from), from), to - from);
        ck_assert_int_eq(pwrite(copy, bytes, (size_t)(to - from), from), to - from);
    }
    return copy;
}

extern void (*kvd_pool_kill_point)(void);

// The process ends here: opens copies of what it leaves, the index of namespace 0 included, and has
// them looked at.
static inline void look_at_copy(struct kvd_pool *pool, void (*check)(struct kvd_pool *opened))
{
    struct test_mem mem = {0};
    struct kvd_pool_mem_ops ops = lasting_ops(&mem);
    struct kvd_error err = {0};
    int region = copy_of(kvd_pool_fd(pool)), own[KVD_LEN(index_fd)];
    void (*again)(void) = KVD_TAKE(kvd_pool_kill_point);
    for (size_t i = 0; i < KVD_LEN(index_fd); i++) {
        own[i] = index_fd[i];
        index_fd[i] = own[i] < 0 ? -1 : copy_of(own[i]);
    }
    struct kvd_pool *opened = kvd_pool_open(region, &lasting, &ops, &err);
    ck_assert_msg(opened != NULL, "%s", err.text);
    verify(opened);
    check(opened);
    kvd_pool_leave(&opened);
    for (size_t i = 0; i < KVD_LEN(index_fd); i++) {
        if (index_fd[i] >= 0)
            close(index_fd[i]);
        index_fd[i] = own[i];
    }
    close(region);
    kvd_pool_kill_point = again;
}

#endif

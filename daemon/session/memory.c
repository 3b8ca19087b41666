// The pool's memory: an arena of the backend.
//
// On a GPU, extents are made ahead of need, as that takes longer than a call should wait, and not
// when it would leave less than memory-floor for the processes beside kvd. A worker in direct mode
// is lent extents of its namespace over the fd socket, to read them. An extent that was lent is
// never wiped for another namespace: it gets new memory, and whoever does not unmap the old keeps
// only what was its own. Of an earlier kvd's, the CPU's are new memory where they had been lent,
// and a GPU's the same memory, which counts as lent.
#include "daemon/session/memory.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "daemon/core/keep.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/secret.h"
#include "daemon/session/fdsock.h"

enum {
    SPARE_EXTENTS = 2,
    FLOOR_CHECK_MS = 1000,
    IDLE_CHECK_MS = 1000,
    NEXT_IDLE_MS = 20, // between extents: giving one back takes a while
};

struct extent {
    uint32_t version; // counts the memories that the extent had; from 1
    bool lent;
};

struct kvd_memory_state {
    struct kvd_arena *arena;
    struct extent *extents;
    // Per extent: which memory it has, a number that no other memory had before; 0: not told yet.
    // It outlives kvd as the extents do, and is never the number of memory that is no longer there.
    uint64_t *numbers;
    bool scarce; // device memory, which others want too
    // Making a spare extent:
    uv_work_t work;
    bool making;
    uint32_t index;
    int rc;
    struct kvd_error err;
};

static bool above_floor(struct kvd_daemon *d, uint64_t bytes)
{
    uint64_t left = d->backend->ops->memory_free(d->backend), floor = d->config.memory_floor;
    return left >= bytes && left - bytes >= floor;
}

// The memory of an extent is gone: those who map it are told.
static void take_back(struct kvd_daemon *d, uint32_t index)
{
    struct kvd_memory_state *m = d->memory;
    struct kvd_session *s, *next;
    struct kvd_fd_grant message = {
        .magic = KVD_FD_MAGIC, .version = KVD_FD_VERSION, .kind = KVD_FD_REVOKE, .extent = index};
    bool lent = m->extents[index].lent;
    m->extents[index].version++;
    m->extents[index].lent = false;
    if (!lent)
        return;
    HASH_ITER(hh, d->sessions, s, next)
    {
        if (!s->extents || !s->extents[index])
            continue;
        s->extents[index] = 0;
        // A worker that does not read it keeps its own old data, and its memory busy, until it
        // ends.
        kvd_connection_send(s->connection, &message, -1, NULL);
    }
}

// -- the pool's ops -----------------------------------------------------------------------------

static const char *extent_name(uint32_t index, char out[32])
{
    snprintf(out, 32, "kvd-extent-%u", index);
    return out;
}

// The extent has new memory, which is to outlive this process. KVD_E_LIMIT.
static int keep(struct kvd_daemon *d, uint32_t index, struct kvd_error *err)
{
    struct kvd_memory_state *m = d->memory;
    char name[32];
    if (kvd_keep_on(d)) {
        int fd = d->backend->ops->extent_descriptor(d->backend, m->arena, index);
        if (fd < 0)
            return kvd_fail(err, KVD_E_LIMIT, "it has no descriptor, and would end with kvd");
        kvd_keep_put(d, extent_name(index, name), fd);
    }
    m->numbers[index] = kvd_random64();
    return KVD_OK;
}

static int mem_alloc(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    struct kvd_daemon *d = ctx;
    struct kvd_memory_state *m = d->memory;
    struct kvd_error err = {0};
    if (m->scarce && !above_floor(d, bytes)) {
        kvd_warning("no extent made: it would leave less than memory-floor on the GPU");
        return KVD_E_FULL;
    }
    m->numbers[index] = 0;
    int rc = d->backend->ops->extent_make(d->backend, m->arena, index, &err);
    rc = rc ? rc : keep(d, index, &err);
    if (rc) {
        kvd_warning("no extent made: %s", err.text);
        d->backend->ops->extent_drop(d->backend, m->arena, index);
        return rc;
    }
    *addr = m->arena->base + index * m->arena->bytes;
    return rc;
}

static int mem_attach(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    struct kvd_daemon *d = ctx;
    struct kvd_memory_state *m = d->memory;
    struct kvd_error err = {0};
    struct extent *e = &m->extents[index];
    char name[32];
    (void)bytes;
    int fd KVD_CLOSE = kvd_keep_take(d, extent_name(index, name));
    if (fd < 0)
        return KVD_E_NOT_FOUND;
    int rc = d->backend->ops->extent_adopt(d->backend, m->arena, index, fd, &e->lent, &err);
    if (rc == KVD_OK && !(e->lent && m->numbers[index]))
        rc = keep(d, index, &err); // it may have been copied
    if (rc) {
        kvd_error("extent %u cannot be taken over: %s", index, err.text);
        return rc;
    }
    *addr = m->arena->base + index * m->arena->bytes;
    return KVD_OK;
}

static void mem_free(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    struct kvd_daemon *d = ctx;
    (void)addr;
    (void)bytes;
    char name[32];
    take_back(d, index);
    d->memory->numbers[index] = 0;
    kvd_keep_drop(d, extent_name(index, name));
    d->backend->ops->extent_drop(d->backend, d->memory->arena, index);
}

static int mem_zero(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    struct kvd_daemon *d = ctx;
    struct kvd_memory_state *m = d->memory;
    struct kvd_error err = {0};
    (void)addr;
    (void)bytes;
    if (!m->extents[index].lent) {
        int rc = d->backend->ops->extent_zero(d->backend, m->arena, index, &err);
        if (rc)
            kvd_error("extent %u: %s", index, err.text);
        return rc;
    }
    // New memory takes the place of the old. Without it the extent stays as it was, lent and its
    // old namespace's.
    uint64_t old = m->numbers[index];
    m->numbers[index] = 0;
    int rc = d->backend->ops->extent_make(d->backend, m->arena, index, &err);
    if (rc) {
        m->numbers[index] = old;
        kvd_warning("extent %u that was lent got no new memory: %s", index, err.text);
        return rc;
    }
    rc = keep(d, index, &err);
    take_back(d, index);
    if (rc)
        kvd_warning("extent %u that was lent: %s", index, err.text);
    return rc;
}

static const char *index_name(uint32_t ns, char out[32])
{
    snprintf(out, 32, "kvd-index-%u", ns);
    return out;
}

static void mem_index_kept(void *ctx, uint32_t ns, int fd)
{
    char name[32];
    if (fd >= 0)
        kvd_keep_put(ctx, index_name(ns, name), fd);
    else
        kvd_keep_drop(ctx, index_name(ns, name));
}

static int mem_index_find(void *ctx, uint32_t ns)
{
    char name[32];
    return kvd_keep_take(ctx, index_name(ns, name));
}

struct kvd_pool_mem_ops kvd_memory_ops(struct kvd_daemon *d)
{
    return (struct kvd_pool_mem_ops){.ctx = d,
                                     .alloc = mem_alloc,
                                     .free = mem_free,
                                     .zero = mem_zero,
                                     .attach = mem_attach,
                                     .index_kept = mem_index_kept,
                                     .index_find = mem_index_find};
}

// -- ahead of need ------------------------------------------------------------------------------

static void spare_work(uv_work_t *work)
{
    struct kvd_daemon *d = work->data;
    struct kvd_memory_state *m = d->memory;
    m->rc = d->backend->ops->extent_make(d->backend, m->arena, m->index, &m->err);
}

static void spare_done(uv_work_t *work, int status)
{
    struct kvd_daemon *d = work->data;
    struct kvd_memory_state *m = d->memory;
    bool made = status == 0 && m->rc == KVD_OK;
    m->making = false;
    if (made && keep(d, m->index, &m->err)) {
        kvd_warning("no extent made ahead of need: %s", m->err.text);
        d->backend->ops->extent_drop(d->backend, m->arena, m->index);
        made = false;
    }
    kvd_pool_spare_made(d->pool, m->index, made ? m->arena->base + m->index * m->arena->bytes : 0);
    kvd_daemon_work_end(d);
    if (made)
        kvd_memory_ahead(d);
}

void kvd_memory_ahead(struct kvd_daemon *d)
{
    struct kvd_memory_state *m = d->memory;
    if (!m->scarce || m->making || d->state == KVD_STOPPING)
        return;
    uint32_t index = kvd_pool_spare_wanted(d->pool, SPARE_EXTENTS);
    if (index == KVD_POOL_NONE)
        return;
    if (!above_floor(d, m->arena->bytes)) {
        kvd_pool_spare_made(d->pool, index, 0);
        return;
    }
    m->index = index;
    m->numbers[index] = 0;
    m->making = true;
    m->work.data = d;
    kvd_daemon_work_begin(d);
    uv_queue_work(&d->loop, &m->work, spare_work, spare_done);
}

// Gives idle extents back when the processes beside kvd are short of memory.
static void on_floor_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    uint64_t left = d->backend->ops->memory_free(d->backend);
    if (left >= d->config.memory_floor)
        return;
    uint64_t bytes = d->memory->arena->bytes;
    uint64_t want = kvd_div_up(d->config.memory_floor - left, bytes);
    uint32_t n = kvd_pool_trim(d->pool, (uint32_t)KVD_MIN(want, (uint64_t)UINT32_MAX));
    if (n)
        kvd_notice("gave %u idle extents back: less than memory-floor was free on the GPU", n);
}

// Host memory goes back when it has not been used for a while, an extent at a time.
static void on_idle_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    uint32_t idle = d->config.idle_memory_ms;
    bool one = idle && kvd_pool_trim_idle(d->pool, kvd_now_ms(d), idle);
    uv_timer_start(timer, on_idle_timer, one ? NEXT_IDLE_MS : IDLE_CHECK_MS, 0);
}

// -- lending ------------------------------------------------------------------------------------

int kvd_memory_lend(struct kvd_daemon *d, struct kvd_session *s, uint64_t addr,
                    struct kvd_error *err)
{
    struct kvd_memory_state *m = d->memory;
    uint32_t index = (uint32_t)((addr - m->arena->base) / m->arena->bytes);
    if (!s->extents)
        s->extents = calloc(m->arena->count, sizeof(*s->extents));
    if (!s->extents)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct extent *e = &m->extents[index];
    if (s->extents[index] == e->version)
        return KVD_OK;
    int fd = -1;
    int rc = d->backend->ops->extent_export(d->backend, m->arena, index, &fd, err);
    if (rc)
        return rc;
    e->lent = true; // even if it does not arrive
    struct kvd_fd_grant grant = {.magic = KVD_FD_MAGIC,
                                 .version = KVD_FD_VERSION,
                                 .kind = KVD_FD_EXTENT,
                                 .extent = index,
                                 .bytes = m->arena->bytes,
                                 .memory = m->numbers[index]};
    rc = kvd_connection_send(s->connection, &grant, fd, err);
    close(fd);
    if (rc == KVD_OK)
        s->extents[index] = e->version;
    return rc;
}

void kvd_memory_forget(struct kvd_daemon *d, struct kvd_session *s)
{
    if (s->extents)
        memset(s->extents, 0, d->memory->arena->count * sizeof(*s->extents));
    s->rotations_sent = 0;
}

static int lend_rotations(struct kvd_daemon *d, struct kvd_session *s, uint32_t plane,
                          struct kvd_error *err)
{
    int fd = d->rotation_fds[s->layout][plane];
    if (fd < 0)
        return kvd_fail(err, KVD_E_INTERNAL, "there was no memory to share the rotation set");
    struct kvd_fd_grant grant = {.magic = KVD_FD_MAGIC,
                                 .version = KVD_FD_VERSION,
                                 .kind = KVD_FD_ROTATIONS,
                                 .extent = plane};
    struct stat st;
    if (fstat(fd, &st) == 0)
        grant.bytes = (uint64_t)st.st_size;
    return kvd_connection_send(s->connection, &grant, fd, err);
}

int kvd_memory_lend_rotations(struct kvd_daemon *d, struct kvd_session *s, struct kvd_error *err)
{
    const struct kvd_layout *l = kvd_pool_layout_get(d->pool, s->layout);
    for (uint32_t p = 0; p < l->n_planes; p++) {
        if (s->rotations_sent >> p & 1 || !kvd_codecs_rotated(l->planes[p].codec))
            continue;
        int rc = lend_rotations(d, s, p, err);
        if (rc)
            return rc;
        s->rotations_sent |= 1u << p;
    }
    return KVD_OK;
}

uint32_t kvd_memory_page_number(const struct kvd_daemon *d, uint64_t addr)
{
    return addr ? (uint32_t)((addr - d->memory->arena->base) / KVD_PAGE_UNIT) : UINT32_MAX;
}

uint32_t kvd_memory_extents(const struct kvd_daemon *d)
{
    return d->memory->arena->count;
}

// -- start and end ------------------------------------------------------------------------------

#define NUMBERS "kvd-extents" // a name

// The numbers of all extents' memories: those of the kvd before, or none.
static int map_numbers(struct kvd_daemon *d, uint32_t n, struct kvd_error *err)
{
    struct stat st;
    off_t bytes = (off_t)(n * sizeof(uint64_t));
    bool kept = kvd_keep_on(d);
    int fd KVD_CLOSE = kept ? kvd_keep_take(d, NUMBERS) : -1;
    bool there = fd >= 0 && fstat(fd, &st) == 0 && st.st_size == bytes;
    if (kept && !there) {
        if (fd >= 0)
            close(KVD_TAKE_FD(fd));
        fd = memfd_create(NUMBERS, MFD_CLOEXEC);
    }
    void *at = MAP_FAILED;
    if (!kept || (fd >= 0 && (there || ftruncate(fd, bytes) == 0)))
        at = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE,
                  kept ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, fd, 0);
    if (at == MAP_FAILED)
        return kvd_fail(err, KVD_E_INTERNAL, "cannot make memory for the numbers of extents: %s",
                        strerror(errno));
    d->memory->numbers = at;
    if (kept && !there)
        kvd_keep_put(d, NUMBERS, fd);
    return KVD_OK;
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    const struct kvd_backend_ops *ops = d->backend->ops;
    uint32_t n = (uint32_t)(c->pool_size / c->extent_size);
    struct kvd_memory_state *m = calloc(1, sizeof(*m));
    struct extent *extents = calloc(n, sizeof(*extents));
    if (!m || !extents) {
        free(extents);
        free(m);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    d->memory = m;
    m->extents = extents;
    for (uint32_t i = 0; i < n; i++)
        extents[i].version = 1;
    if (map_numbers(d, n, err))
        return err->code;
    m->arena = ops->arena_new(d->backend, n, c->extent_size, err);
    if (!m->arena)
        return err->code;
    m->scarce = ops->memory_free(d->backend) != UINT64_MAX;
    d->memory_timer.data = d;
    if (m->scarce && c->memory_floor)
        uv_timer_start(&d->memory_timer, on_floor_timer, FLOOR_CHECK_MS, FLOOR_CHECK_MS);
    else if (!m->scarce)
        uv_timer_start(&d->memory_timer, on_idle_timer, IDLE_CHECK_MS, 0);
    return KVD_OK;
}

static void deinit(struct kvd_daemon *d)
{
    struct kvd_memory_state *m = KVD_TAKE(d->memory);
    if (!m)
        return;
    uint32_t n = (uint32_t)(d->config.pool_size / d->config.extent_size);
    d->backend->ops->arena_free(d->backend, &m->arena);
    if (m->numbers)
        munmap(m->numbers, n * sizeof(*m->numbers));
    free(m->extents);
    free(m);
}

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    kvd_memory_ahead(d);
    return KVD_OK;
}

const struct kvd_part kvd_part_memory = {.init = init, .start = start, .deinit = deinit};

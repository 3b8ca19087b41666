#include "daemon/session/buffer.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "daemon/rpc/users.h"

enum { SEGMENT_TIMES = 16 }; // that a GPU's memory may be registered as segments

struct kvd_buffer *kvd_session_any_buffer(struct kvd_session *s, uint64_t id)
{
    struct kvd_buffer *b;
    HASH_FIND(hh, s->buffers, &id, sizeof(id), b);
    return b;
}

struct kvd_buffer *kvd_session_buffer(struct kvd_session *s, uint64_t id)
{
    struct kvd_buffer *b = kvd_session_any_buffer(s, id);
    return b && b->mapped == b->size ? b : NULL;
}

struct kvd_buffer *kvd_session_want_buffer(struct kvd_session *s, uint64_t id,
                                           struct kvd_error *err)
{
    struct kvd_buffer *b = kvd_session_any_buffer(s, id);
    if (b && b->mapped == b->size)
        return b;
    if (b)
        kvd_fail(err, KVD_E_PRECONDITION,
                 "buffer %" PRIu64 " has %" PRIu64 " of its %" PRIu64
                 " bytes so far: register the rest of its segments, or release it",
                 id, b->mapped, b->size);
    else
        kvd_fail(err, KVD_E_NOT_FOUND, "this session has no buffer %" PRIu64, id);
    return NULL;
}

// Maps a memfd.
static int map_memfd(const struct kvd_foreign *m, struct kvd_buffer *b, struct kvd_error *err)
{
    struct stat st;
    struct statfs fs;
    int seals = fcntl(m->fd, F_GET_SEALS);
    // Without the seal the worker could shrink the file and make our next access a SIGBUS.
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return kvd_fail(err, KVD_E_INVALID,
                        "buffers are memfds sealed with F_SEAL_SHRINK (memfd_create with "
                        "MFD_ALLOW_SEALING, then fcntl F_ADD_SEALS)");
    // The seal does not keep holes from being punched later. In other memory kvd then finds zeros;
    // a huge page can only be had while some are free, and our next access were a SIGBUS.
    if (fstatfs(m->fd, &fs) || fs.f_type == HUGETLBFS_MAGIC)
        return kvd_fail(err, KVD_E_INVALID,
                        "the memfd is of huge pages, which its owner could take away while kvd "
                        "uses them; make it without MFD_HUGETLB");
    if (fstat(m->fd, &st) || (uint64_t)st.st_size < m->size)
        return kvd_fail(err, KVD_E_INVALID, "size is %" PRIu64 ", the memfd has %" PRId64 " bytes",
                        m->size, (int64_t)st.st_size);
    // The kernel charges memory to whose process touches it first: that is to be the worker.
    if ((uint64_t)st.st_blocks * 512 < (uint64_t)st.st_size)
        return kvd_fail(err, KVD_E_INVALID,
                        "the memfd has holes: %" PRIu64 " of its %" PRId64
                        " bytes have memory; give it memory with "
                        "posix_fallocate before it is registered",
                        (uint64_t)st.st_blocks * 512, (int64_t)st.st_size);
    void *p = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (p == MAP_FAILED)
        return kvd_fail(err, errno == ENOMEM ? KVD_E_LIMIT : KVD_E_INVALID,
                        "cannot map the memfd for reading and writing: %s", strerror(errno));
    b->data = p;
    b->inode = st.st_ino;
    return KVD_OK;
}

static uint64_t host_bytes(const struct kvd_buffer *b)
{
    return b->kind == KVD_MEMORY_MEMFD ? b->size : 0;
}

static uint64_t segment_bytes(const struct kvd_buffer *b)
{
    return b->kind == KVD_MEMORY_CUDA_SEGMENTS ? b->size : 0;
}

static void discharge(struct kvd_buffer *b)
{
    kvd_user_give(b->user, KVD_SHARE_MAPPINGS, 1 + b->segments);
    kvd_user_give(b->user, KVD_SHARE_BUFFER_BYTES, host_bytes(b));
    kvd_user_give(b->user, KVD_SHARE_SEGMENT_BYTES, segment_bytes(b));
    kvd_user_unref(&b->user);
}

// What counts against max-buffer-bytes. A GPU's allocation is mapped once, however often it is
// registered, and what there is of them the GPU bounds. Segments are an engine's whole KV too; as
// each registering maps them anew they are a share of their own.
static uint64_t counted_bytes(enum kvd_memory kind, uint64_t size)
{
    return kind == KVD_MEMORY_CUDA_IPC || kind == KVD_MEMORY_CUDA_SEGMENTS ? 0 : size;
}

// Takes a buffer's part of its user's shares.
static int charge(struct kvd_daemon *d, const struct kvd_session *s, struct kvd_buffer *b,
                  struct kvd_error *err)
{
    b->user = kvd_user_ref(d, s->uid);
    if (!b->user)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    int rc = kvd_user_take(b->user, KVD_SHARE_MAPPINGS, 1, err);
    if (rc == KVD_OK) {
        rc = kvd_user_take(b->user, KVD_SHARE_BUFFER_BYTES, host_bytes(b), err);
        if (rc == KVD_OK) {
            rc = kvd_user_take(b->user, KVD_SHARE_SEGMENT_BYTES, segment_bytes(b), err);
            if (rc)
                kvd_user_give(b->user, KVD_SHARE_BUFFER_BYTES, host_bytes(b));
        }
        if (rc)
            kvd_user_give(b->user, KVD_SHARE_MAPPINGS, 1);
    }
    if (rc)
        kvd_user_unref(&b->user);
    return rc;
}

// An id that the session does not use: the one that it had before the session was resumed, if it is
// wanted.
static uint64_t id_for(struct kvd_daemon *d, const struct kvd_session *s, uint64_t wanted)
{
    struct kvd_buffer *taken = NULL;
    uint64_t id = wanted ? wanted : ++d->next_buffer;
    HASH_FIND(hh, s->buffers, &id, sizeof(id), taken);
    while (taken) {
        id = ++d->next_buffer;
        HASH_FIND(hh, s->buffers, &id, sizeof(id), taken);
    }
    return id;
}

static int room_for_one(const struct kvd_session *s, uint64_t size, struct kvd_error *err)
{
    if (size == 0)
        return kvd_fail(err, KVD_E_INVALID, "size is 0");
    if (HASH_COUNT(s->buffers) >= KVD_MAX_BUFFERS)
        return kvd_fail(err, KVD_E_LIMIT, "a session registers at most %d buffers; release some",
                        KVD_MAX_BUFFERS);
    return KVD_OK;
}

static void link_buffer(struct kvd_daemon *d, struct kvd_session *s, uint64_t key, uint64_t id,
                        struct kvd_buffer *b)
{
    b->d = d;
    b->id = id_for(d, s, id);
    b->key = key;
    b->refs = 1;
    HASH_ADD(hh, s->buffers, id, sizeof(b->id), b);
    s->buffer_bytes += b->size;
    s->counted_bytes += counted_bytes(b->kind, b->size);
}

int kvd_session_add_buffer(struct kvd_daemon *d, struct kvd_session *s, uint64_t key, uint64_t id,
                           const struct kvd_foreign *m, struct kvd_buffer **out,
                           struct kvd_error *err)
{
    int rc = room_for_one(s, m->size, err);
    if (rc)
        return rc;
    const uint64_t counted = counted_bytes(m->kind, m->size);
    if (counted && (s->counted_bytes > d->config.max_buffer_bytes ||
                    counted > d->config.max_buffer_bytes - s->counted_bytes))
        return kvd_fail(err, KVD_E_QUOTA,
                        "the session's buffers would pass max-buffer-bytes (%" PRIu64 ")",
                        d->config.max_buffer_bytes);
    struct kvd_buffer *b = calloc(1, sizeof(*b));
    if (!b)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    b->kind = m->kind;
    b->size = b->mapped = m->size;
    rc = charge(d, s, b, err);
    if (rc == KVD_OK) {
        rc = m->kind == KVD_MEMORY_MEMFD
                 ? map_memfd(m, b, err)
                 : d->backend->ops->foreign_map(d->backend, m, &b->data, err);
        if (rc)
            discharge(b);
    }
    if (rc) {
        free(b);
        return rc;
    }
    link_buffer(d, s, key, id, b);
    *out = b;
    return KVD_OK;
}

// -- segments -----------------------------------------------------------------------------------

// Whether these follow what the call says, within the buffer; *bytes: of all of them.
static int check_segments(const struct kvd_segments *m, uint64_t *bytes, struct kvd_error *err)
{
    *bytes = 0;
    if (m->size % KVD_SEGMENT_UNIT)
        return kvd_fail(err, KVD_E_INVALID, "size is %" PRIu64 ", not a multiple of %d", m->size,
                        KVD_SEGMENT_UNIT);
    if (m->mapped > m->size)
        return kvd_fail(err, KVD_E_INVALID, "mapped is %" PRIu64 ", size %" PRIu64, m->mapped,
                        m->size);
    for (uint32_t i = 0; i < m->n; i++) {
        const uint64_t one = m->segments[i].bytes, left = m->size - m->mapped - *bytes;
        if (one == 0 || one % KVD_SEGMENT_UNIT)
            return kvd_fail(err, KVD_E_INVALID,
                            "segments[%u] has %" PRIu64 " bytes, not a multiple of %d", i, one,
                            KVD_SEGMENT_UNIT);
        if (one > left)
            return kvd_fail(err, KVD_E_INVALID,
                            "segments[%u] has %" PRIu64 " bytes, and only %" PRIu64
                            " of the buffer's size are left",
                            i, one, left);
        *bytes += one;
    }
    return KVD_OK;
}

// A buffer that none of its segments has come of yet.
static int reserve(struct kvd_daemon *d, struct kvd_session *s, uint64_t size,
                   struct kvd_buffer **out, struct kvd_error *err)
{
    int rc = room_for_one(s, size, err);
    if (rc)
        return rc;
    if (size > kvd_share_total(d, KVD_SHARE_SEGMENT_BYTES)) // a sum of more could overflow
        return kvd_fail(err, KVD_E_LIMIT,
                        "size is %" PRIu64 ": so many segments of GPU memory there cannot be",
                        size);
    struct kvd_buffer *b = calloc(1, sizeof(*b));
    if (!b)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    *b = (struct kvd_buffer){.kind = KVD_MEMORY_CUDA_SEGMENTS, .size = size};
    rc = charge(d, s, b, err);
    if (rc == KVD_OK) {
        rc = d->backend->ops->segments_reserve(d->backend, size, &b->data, err);
        if (rc)
            discharge(b);
    }
    if (rc)
        free(b);
    else
        *out = b;
    return rc;
}

static int map_more(struct kvd_daemon *d, struct kvd_buffer *b, const struct kvd_segments *m,
                    uint64_t bytes, struct kvd_error *err)
{
    int rc = kvd_user_take(b->user, KVD_SHARE_MAPPINGS, m->n, err);
    if (rc)
        return rc;
    rc = d->backend->ops->segments_map(d->backend, b->data + b->mapped, m->segments, m->n, err);
    if (rc) {
        kvd_user_give(b->user, KVD_SHARE_MAPPINGS, m->n);
        return rc;
    }
    b->segments += m->n;
    b->mapped += bytes;
    return KVD_OK;
}

static struct kvd_buffer *begun(struct kvd_session *s, uint64_t key, uint64_t size)
{
    struct kvd_buffer *b, *next;
    HASH_ITER(hh, s->buffers, b, next)
    {
        if (b->kind == KVD_MEMORY_CUDA_SEGMENTS && b->key == key && b->size == size)
            return b;
    }
    return NULL;
}

int kvd_session_add_segments(struct kvd_daemon *d, struct kvd_session *s, uint64_t key, uint64_t id,
                             const struct kvd_segments *m, struct kvd_buffer **out,
                             struct kvd_error *err)
{
    struct kvd_buffer *b = begun(s, key, m->size);
    const uint64_t mapped = b ? b->mapped : 0;
    const bool first = !b;
    uint64_t bytes;
    int rc = check_segments(m, &bytes, err);
    if (rc == KVD_OK && m->mapped + bytes > mapped) {
        if (m->mapped != mapped)
            rc = kvd_fail(err, KVD_E_INVALID,
                          "segments that follow %" PRIu64 " bytes of a buffer that has %" PRIu64,
                          m->mapped, mapped);
        if (rc == KVD_OK && first)
            rc = reserve(d, s, m->size, &b, err);
        if (rc == KVD_OK)
            rc = map_more(d, b, m, bytes, err);
    }
    if (rc == KVD_OK && first)
        link_buffer(d, s, key, id, b);
    else if (rc && first && b) {
        d->backend->ops->segments_unmap(d->backend, b->data, 0, b->size);
        discharge(b);
        free(KVD_TAKE(b));
    }
    *out = b;
    return rc;
}

// -- the end ------------------------------------------------------------------------------------

static struct kvd_buffer *buffer_of(struct kvd_reclaim *r)
{
    return (struct kvd_buffer *)r;
}

static void unmap(struct kvd_reclaim *r)
{
    const struct kvd_buffer *b = buffer_of(r);
    struct kvd_backend *backend = b->d->backend;
    if (b->kind == KVD_MEMORY_CUDA_SEGMENTS)
        backend->ops->segments_unmap(backend, b->data, b->mapped, b->size);
    else
        backend->ops->foreign_unmap(backend, b->kind, b->data, b->size);
}

static void unmapped(struct kvd_reclaim *r)
{
    struct kvd_buffer *b = buffer_of(r);
    if (b->gone)
        b->gone(b);
    discharge(b);
    free(b);
}

// Whoever lets go of memory last frees it. That takes a second for gigabytes in many segments, and
// a worker that dies leaves as many buffers as it had at once.
void kvd_buffer_unref(struct kvd_buffer *b)
{
    if (--b->refs)
        return;
    b->reclaim.let_go = unmap;
    b->reclaim.done = unmapped;
    if (b->kind == KVD_MEMORY_MEMFD) { // its owner has it all the same
        kvd_reclaim_mapping(b->d, b->data, b->size);
        unmapped(&b->reclaim);
    } else {
        kvd_reclaim_begin(b->d, &b->reclaim);
    }
}

void kvd_session_drop_buffer(struct kvd_session *s, struct kvd_buffer *b)
{
    HASH_DEL(s->buffers, b);
    s->buffer_bytes -= b->size;
    s->counted_bytes -= counted_bytes(b->kind, b->size);
    kvd_buffer_unref(b);
}

// What the host makes possible of them.
static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    uint64_t maps = 65530;
    FILE *f KVD_FCLOSE = fopen("/proc/sys/vm/max_map_count", "re");
    if (f && fscanf(f, "%" SCNu64, &maps) != 1)
        maps = 65530;
    // malloc cannot do without mappings, and what calls it does not get over that.
    uint64_t extents = d->config.pool_size / d->config.extent_size;
    uint64_t half = maps / 2 > extents ? maps / 2 - extents : 0;
    kvd_share_possible(d, KVD_SHARE_MAPPINGS, KVD_MAX(half, (uint64_t)64));
    uint64_t memory = uv_get_total_memory(), allowed = uv_get_constrained_memory();
    kvd_share_possible(d, KVD_SHARE_BUFFER_BYTES, allowed && allowed < memory ? allowed : memory);
    // Each of the sessions of all engines may have all that they have of the GPU. What is bounded
    // is how many addresses somebody can take who registers the same memory again and again.
    if (d->backend->ops->memory_total)
        kvd_share_possible(d, KVD_SHARE_SEGMENT_BYTES,
                           SEGMENT_TIMES * d->backend->ops->memory_total(d->backend));
    return KVD_OK;
}

const struct kvd_part kvd_part_buffers = {.init = init};

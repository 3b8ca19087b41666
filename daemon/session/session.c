// Sessions: what a worker holds, and the end of it.
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "daemon/rpc/rpc.h"
#include "daemon/rpc/users.h"

void kvd_secret_new(char out[KVD_SECRET_TEXT])
{
    uint8_t bytes[16];
    for (size_t have = 0; have < sizeof(bytes);) {
        ssize_t n = getrandom(bytes + have, sizeof(bytes) - have, 0);
        have += n > 0 ? (size_t)n : 0;
    }
    kvd_hex(bytes, sizeof(bytes), out);
}

static uint64_t random64(void)
{
    uint64_t value = 0;
    while (getrandom(&value, sizeof(value), 0) != (ssize_t)sizeof(value))
        ;
    return value;
}

struct kvd_session *kvd_session_find(struct kvd_daemon *d, const char *secret)
{
    struct kvd_session *s = NULL;
    if (strlen(secret) != KVD_SECRET_TEXT - 1)
        return NULL;
    HASH_FIND_STR(d->sessions, secret, s);
    if (s) {
        s->used_ms = kvd_now_ms(d);
        s->calls++;
    }
    return s;
}

// Whether a user and a namespace may have one session more; the user is charged.
static int admit(struct kvd_daemon *d, uint32_t ns, struct kvd_user *user, struct kvd_error *err)
{
    struct kvd_pool_namespace_info info;
    uint32_t in_use = HASH_COUNT(d->sessions), most = d->config.max_sessions;
    kvd_pool_namespace_info(d->pool, ns, &info); // this session is among its holders already
    if (in_use >= most || info.holders > most - in_use)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%u of %u sessions are open, %u of them in namespace %s, which may have as "
                        "many as are left; close some or raise max-sessions",
                        in_use, most, info.holders - 1, info.name);
    return kvd_user_take(user, KVD_SHARE_SESSIONS, 1, err);
}

int kvd_session_new(struct kvd_daemon *d, uint32_t ns, uint32_t layout, struct kvd_connection *conn,
                    int64_t uid, struct kvd_session **out, struct kvd_error *err)
{
    struct kvd_session *s = calloc(1, sizeof(*s));
    struct kvd_user *user = s ? kvd_user_ref(d, uid) : NULL;
    int rc = user ? admit(d, ns, user, err) : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (rc) {
        kvd_user_unref(&user);
        free(s);
        return rc;
    }
    s->user = user;
    kvd_secret_new(s->secret);
    s->id = ++d->next_session;
    s->appender = random64();
    s->ns = ns;
    s->layout = layout;
    s->connection = conn;
    s->pid = s->uid = -1;
    s->opened_ms = s->used_ms = kvd_now_ms(d);
    if (conn) {
        s->pid = kvd_connection_peer(conn).pid;
        s->uid = kvd_connection_peer(conn).uid;
        kvd_connection_bind(conn, s);
    }
    HASH_ADD_STR(d->sessions, secret, s);
    d->metrics.sessions_opened++;
    *out = s;
    return KVD_OK;
}

void kvd_session_end(struct kvd_daemon *d, struct kvd_session *s, const char *why)
{
    kvd_info("session ended id=%llu client=%s pid=%lld why=\"%s\" sequences=%u calls=%llu",
             (unsigned long long)s->id, s->client_name, (long long)s->pid, why, HASH_COUNT(s->held),
             (unsigned long long)s->calls);
    kvd_compute_cancel(d, s);
    while (s->watchers) {
        struct kvd_call *c = s->watchers;
        s->watchers = c->next_watch;
        c->session = NULL;
        kvd_call_finish(c, KVD_OK, "the session ended");
    }
    struct kvd_held *h, *h_next;
    HASH_ITER(hh, s->held, h, h_next)
    {
        kvd_pool_seq_release(d->pool, h->seq);
        HASH_DEL(s->held, h);
        free(h);
        kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
    }
    struct kvd_buffer *b, *b_next;
    HASH_ITER(hh, s->buffers, b, b_next)
    kvd_session_drop_buffer(s, b);
    for (size_t i = 0; i < KVD_LEN(s->replays); i++)
        free(s->replays[i].data);
    free(s->extents);
    kvd_pool_layout_unref(d->pool, s->layout);
    kvd_namespace_close(d, s->ns);
    kvd_user_give(s->user, KVD_SHARE_SESSIONS, 1);
    kvd_user_unref(&s->user);
    struct kvd_connection *conn = s->connection;
    if (conn)
        kvd_connection_bind(conn, NULL);
    HASH_DEL(d->sessions, s);
    free(s);
    d->metrics.sessions_ended++;
    if (conn)
        kvd_connection_close(conn);
    kvd_daemon_session_ended(d);
}

void kvd_session_expire(struct kvd_daemon *d)
{
    struct kvd_session *s, *next;
    HASH_ITER(hh, d->sessions, s, next)
    {
        if (s->connection || kvd_now_ms(d) - s->used_ms < s->lease_ms)
            continue;
        d->metrics.leases_expired++;
        kvd_session_end(d, s, "its lease ran out");
    }
}

static struct kvd_held *find_held(const struct kvd_session *s, uint64_t seq)
{
    struct kvd_held *h;
    HASH_FIND(hh, s->held, &seq, sizeof(seq), h);
    return h;
}

uint32_t kvd_session_holds(const struct kvd_session *s, uint64_t seq)
{
    const struct kvd_held *h = find_held(s, seq);
    return h ? h->holds : 0;
}

int kvd_session_add_held(struct kvd_session *s, uint64_t seq, bool *first, struct kvd_error *err)
{
    struct kvd_held *h = find_held(s, seq);
    if (h && h->holds == UINT32_MAX)
        return kvd_fail(err, KVD_E_LIMIT, "the session holds sequence %llu %u times; free some",
                        (unsigned long long)seq, h->holds);
    if (!h && HASH_COUNT(s->held) >= KVD_MAX_HELD)
        return kvd_fail(err, KVD_E_LIMIT, "a session holds at most %d sequences; free some",
                        KVD_MAX_HELD);
    *first = !h;
    if (!h) {
        int rc = kvd_user_take(s->user, KVD_SHARE_SEQUENCES, 1, err);
        if (rc)
            return rc;
        h = calloc(1, sizeof(*h));
        if (!h) {
            kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        }
        h->seq = seq;
        HASH_ADD(hh, s->held, seq, sizeof(h->seq), h);
    }
    h->holds++;
    return KVD_OK;
}

bool kvd_session_drop_held(struct kvd_session *s, uint64_t seq)
{
    struct kvd_held *h = find_held(s, seq);
    if (!h || --h->holds)
        return false;
    HASH_DEL(s->held, h);
    free(h);
    kvd_user_give(s->user, KVD_SHARE_SEQUENCES, 1);
    return true;
}

struct kvd_buffer *kvd_session_buffer(struct kvd_session *s, uint64_t id)
{
    struct kvd_buffer *b;
    HASH_FIND(hh, s->buffers, &id, sizeof(id), b);
    return b;
}

// Maps a memfd.
static int map_memfd(const struct kvd_foreign *m, uint8_t **data, struct kvd_error *err)
{
    struct stat st;
    int seals = fcntl(m->fd, F_GET_SEALS);
    // Without the seal the worker could shrink the file and make our next access a SIGBUS.
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        return kvd_fail(err, KVD_E_INVALID,
                        "buffers are memfds sealed with F_SEAL_SHRINK (memfd_create with "
                        "MFD_ALLOW_SEALING, then fcntl F_ADD_SEALS)");
    if (fstat(m->fd, &st) || (uint64_t)st.st_size < m->size)
        return kvd_fail(err, KVD_E_INVALID, "size is %llu, the memfd has %lld bytes",
                        (unsigned long long)m->size, (long long)st.st_size);
    // The kernel charges memory to whose process touches it first: that is to be the worker.
    if ((uint64_t)st.st_blocks * 512 < (uint64_t)st.st_size)
        return kvd_fail(
            err, KVD_E_INVALID,
            "the memfd has holes: %llu of its %lld bytes have memory; give it memory with "
            "posix_fallocate before it is registered",
            (unsigned long long)st.st_blocks * 512, (long long)st.st_size);
    void *p = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    if (p == MAP_FAILED)
        return kvd_fail(err, KVD_E_INVALID, "cannot map the memfd for reading and writing: %s",
                        strerror(errno));
    *data = p;
    return KVD_OK;
}

void kvd_session_measure_host(struct kvd_daemon *d)
{
    unsigned long long maps = 65530;
    FILE *f KVD_FCLOSE = fopen("/proc/sys/vm/max_map_count", "re");
    if (f && fscanf(f, "%llu", &maps) != 1)
        maps = 65530;
    // malloc cannot do without mappings, and what calls it does not get over that.
    uint64_t extents = d->config.pool_size / d->config.extent_size;
    uint64_t half = maps / 2 > extents ? maps / 2 - extents : 0;
    kvd_share_possible(d, KVD_SHARE_MAPPINGS, KVD_MAX(half, (uint64_t)64));
    uint64_t memory = uv_get_total_memory(), allowed = uv_get_constrained_memory();
    kvd_share_possible(d, KVD_SHARE_BUFFER_BYTES, allowed && allowed < memory ? allowed : memory);
}

static uint64_t host_bytes(const struct kvd_buffer *b)
{
    return b->kind == KVD_MEMORY_MEMFD ? b->size : 0;
}

static void discharge(struct kvd_buffer *b)
{
    kvd_user_give(b->user, KVD_SHARE_MAPPINGS, 1);
    kvd_user_give(b->user, KVD_SHARE_BUFFER_BYTES, host_bytes(b));
    kvd_user_unref(&b->user);
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
        if (rc)
            kvd_user_give(b->user, KVD_SHARE_MAPPINGS, 1);
    }
    if (rc)
        kvd_user_unref(&b->user);
    return rc;
}

int kvd_session_add_buffer(struct kvd_daemon *d, struct kvd_session *s, uint64_t key,
                           const struct kvd_foreign *m, struct kvd_buffer **out,
                           struct kvd_error *err)
{
    if (m->size == 0)
        return kvd_fail(err, KVD_E_INVALID, "size is 0");
    if (HASH_COUNT(s->buffers) >= KVD_MAX_BUFFERS)
        return kvd_fail(err, KVD_E_LIMIT, "a session registers at most %d buffers; release some",
                        KVD_MAX_BUFFERS);
    if (s->buffer_bytes > d->config.max_buffer_bytes ||
        m->size > d->config.max_buffer_bytes - s->buffer_bytes)
        return kvd_fail(err, KVD_E_QUOTA,
                        "the session's buffers would pass max-buffer-bytes (%llu)",
                        (unsigned long long)d->config.max_buffer_bytes);
    struct kvd_buffer *b = calloc(1, sizeof(*b));
    if (!b)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    b->kind = m->kind;
    b->size = m->size;
    int rc = charge(d, s, b, err);
    if (rc == KVD_OK) {
        rc = m->kind == KVD_MEMORY_MEMFD
                 ? map_memfd(m, &b->data, err)
                 : d->backend->ops->foreign_map(d->backend, m, &b->data, err);
        if (rc)
            discharge(b);
    }
    if (rc) {
        free(b);
        return rc;
    }
    b->d = d;
    b->id = ++d->next_buffer;
    b->key = key;
    b->refs = 1;
    HASH_ADD(hh, s->buffers, id, sizeof(b->id), b);
    s->buffer_bytes += m->size;
    *out = b;
    return KVD_OK;
}

void kvd_buffer_unref(struct kvd_buffer *b)
{
    if (--b->refs)
        return;
    if (b->kind == KVD_MEMORY_MEMFD)
        kvd_reclaim_mapping(b->d, b->data, b->size);
    else
        b->d->backend->ops->foreign_unmap(b->d->backend, b->kind, b->data, b->size);
    discharge(b);
    free(b);
}

void kvd_session_drop_buffer(struct kvd_session *s, struct kvd_buffer *b)
{
    HASH_DEL(s->buffers, b);
    s->buffer_bytes -= b->size;
    kvd_buffer_unref(b);
}

// Memory shared with the daemon: made, registered, and released.
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "client/lib/client.h"
#include "client/lib/paged.h"

#define MEMORY_KIND(name) KVD__V1__REGISTER_BUFFER_REQUEST__MEMORY__##name

int kvd_buffer_register(kvd_client *c, kvd_buffer *b, uint64_t deadline, struct kvd_error *err)
{
    Kvd__V1__RegisterBufferRequest req = KVD__V1__REGISTER_BUFFER_REQUEST__INIT;
    Kvd__V1__RegisterBufferReply *reply;
    int rc = KVD_OK;
    if (b->local)
        return KVD_OK;
    if (b->kind != MEMORY_KIND(MEMFD) && b->data) // kvd may be another than before
        rc = kvd_gpu_same(c, b->data, b->device, err);
    if (rc)
        return rc;
    if (b->kind == MEMORY_KIND(CUDA_SEGMENTS))
        return kvd_segments_register(c, b, deadline, err);
    if (b->fd >= 0)
        rc = kvd_fdsock_send(c->sock, b->key, b->fd, kvd_left_ms(deadline), err);
    if (rc)
        return rc;
    req.session = c->session;
    req.key = b->key;
    req.size = b->at + b->size;
    req.buffer = b->id; // a call that is sent again names it so
    req.memory = b->kind;
    if (b->kind == MEMORY_KIND(CUDA_IPC))
        req.cuda_ipc_handle = (ProtobufCBinaryData){sizeof(b->ipc), b->ipc};
    rc = kvd_channel_call(c->channel, "/kvd.v1.KvCache/RegisterBuffer", &req,
                          &kvd__v1__register_buffer_reply__descriptor, kvd_left_ms(deadline),
                          &reply, err);
    if (rc)
        return rc;
    b->id = reply->buffer;
    kvd__v1__register_buffer_reply__free_unpacked(reply, NULL);
    return KVD_OK;
}

kvd_result kvd_client_add_buffer(kvd_client *c, kvd_buffer *b, kvd_failure *err)
{
    struct kvd_error e = {0};
    uint64_t deadline = kvd_client_deadline(c);
    b->client = c;
    b->key = ++c->next_key;
    if (c->remote && !b->local) {
        kvd_fail(&e, KVD_E_INVALID, "GPU memory is shared over kvd's unix: address only");
        return kvd_client_fail(err, &e);
    }
    kvd_result result = KVD_SUCCESS;
    for (bool again = true; again;) {
        if (kvd_fork_check(c, &e) || kvd_client_enter(c, deadline, &e))
            return kvd_client_fail(err, &e);
        int rc = c->lost ? kvd_fail(&e, KVD_E_UNAUTH, "no session") // to be opened again
                         : kvd_buffer_register(c, b, deadline, &e);
        if (rc == KVD_OK) {
            pthread_mutex_lock(&c->buffers_lock);
            b->next = c->buffers;
            c->buffers = b;
            pthread_mutex_unlock(&c->buffers_lock);
        }
        result = kvd_client_leave(c, rc, &e, deadline, &again, err);
    }
    return result;
}

// All of it gets its memory here: kvd takes none that it would have to pay for.
static int make_memory(kvd_buffer *b, struct kvd_error *err)
{
    // A memfd knows no bounds but the end of the machine's memory, and of its processes.
    uint64_t host = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (b->size > host)
        return kvd_fail(err, KVD_E_INTERNAL, "%llu bytes of memory: the host has %llu",
                        (unsigned long long)b->size, (unsigned long long)host);
    if (b->local) {
        b->data = mmap(NULL, b->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return b->data != MAP_FAILED ? KVD_OK
                                     : kvd_fail(err, -errno, "cannot map %llu bytes: %s",
                                                (unsigned long long)b->size, strerror(errno));
    }
    b->fd = memfd_create("kvd-buffer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int rc = 0;
    if (b->fd >= 0)
        while ((rc = posix_fallocate(b->fd, 0, (off_t)b->size)) == EINTR)
            continue;
    errno = rc ? rc : errno;
    if (b->fd < 0 || rc || fcntl(b->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))
        return kvd_fail(err, -errno, "cannot make %llu bytes of shared memory: %s",
                        (unsigned long long)b->size, strerror(errno));
    b->data = mmap(NULL, b->size, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
    if (b->data == MAP_FAILED)
        return kvd_fail(err, -errno, "cannot map %llu bytes: %s", (unsigned long long)b->size,
                        strerror(errno));
    return KVD_OK;
}

static void drop(kvd_buffer *b, bool unmap)
{
    if (unmap && b->kind == MEMORY_KIND(MEMFD) && b->data != MAP_FAILED)
        munmap(b->data, b->size);
    if (unmap && b->owned && !b->client->forked)
        kvd_gpu_staging_free(b->data);
    if (b->fd >= 0)
        close(b->fd);
    free(b->segments);
    free(b);
}

kvd_result kvd_buffer_new(kvd_client *c, uint64_t bytes, kvd_buffer **out, kvd_failure *err)
{
    struct kvd_error e = {0};
    KVD_WANT(err, "client", c, "out", out);
    kvd_buffer *b = bytes ? calloc(1, sizeof(*b)) : NULL;
    if (!b) {
        kvd_fail(&e, bytes ? KVD_E_INTERNAL : KVD_E_INVALID,
                 bytes ? "out of memory" : "a buffer of 0 bytes");
        return kvd_client_fail(err, &e);
    }
    *b = (kvd_buffer){.size = bytes, .fd = -1, .data = MAP_FAILED, .local = c->remote};
    kvd_result rc =
        make_memory(b, &e) ? kvd_client_fail(err, &e) : kvd_client_add_buffer(c, b, err);
    if (rc == KVD_SUCCESS)
        *out = b;
    else
        drop(b, true);
    return rc;
}

// Takes it off the client's list, which is all that a forked child may do.
static void unlink_buffer(kvd_client *c, kvd_buffer *b)
{
    if (!c->forked)
        pthread_mutex_lock(&c->buffers_lock);
    kvd_buffer **link = &c->buffers;
    while (*link != b)
        link = &(*link)->next;
    *link = b->next;
    if (!c->forked)
        pthread_mutex_unlock(&c->buffers_lock);
}

void *kvd_buffer_take(kvd_buffer **bp, uint64_t deadline, bool unmap)
{
    kvd_buffer *b = KVD_TAKE(*bp);
    if (!b)
        return NULL;
    kvd_client *c = b->client;
    void *data = b->data;
    kvd_registered_end(b);
    unlink_buffer(c, b);
    Kvd__V1__ReleaseBufferRequest req = KVD__V1__RELEASE_BUFFER_REQUEST__INIT;
    Kvd__V1__ReleaseBufferReply *reply;
    // Best effort: the session's end releases it too.
    if (!c->forked && !b->local && kvd_client_enter(c, deadline, NULL) == KVD_OK) {
        req.session = c->session;
        req.buffer = b->id;
        if (kvd_channel_call(c->channel, "/kvd.v1.KvCache/ReleaseBuffer", &req,
                             &kvd__v1__release_buffer_reply__descriptor, kvd_left_ms(deadline),
                             &reply, NULL) == KVD_OK)
            kvd__v1__release_buffer_reply__free_unpacked(reply, NULL);
        kvd_gate_leave(&c->gate);
    }
    drop(b, unmap);
    return data;
}

void *kvd_buffer_detach(kvd_buffer **bp)
{
    return bp && *bp ? kvd_buffer_take(bp, kvd_client_deadline((*bp)->client), false) : NULL;
}

void kvd_buffer_free(kvd_buffer **bp)
{
    if (bp && *bp)
        kvd_buffer_take(bp, kvd_client_deadline((*bp)->client), true);
}

void kvd_buffers_drop(kvd_client *c)
{
    while (c->buffers) {
        kvd_buffer *b = c->buffers;
        c->buffers = b->next;
        drop(b, true);
    }
}

void *kvd_buffer_data(kvd_buffer *b)
{
    return b ? b->data : NULL;
}

uint64_t kvd_buffer_size(const kvd_buffer *b)
{
    return b ? b->size : 0;
}

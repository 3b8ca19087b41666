#include "daemon/tier/pinned.h"

#include <pthread.h>
#include <utlist.h>

#include "daemon/core/log.h"

enum { ALIGN = 4096 };

// In idle memory itself.
struct idle {
    struct idle *prev, *next; // the one that came last first
    uint64_t bytes;
};

struct kvd_pinned {
    struct kvd_backend *backend; // NULL: does not pin
    void (*unpin)(void *at);     // the same
    pthread_mutex_t lock;
    struct idle *idle;
    uint64_t kept, keep; // bytes
    uint64_t users;      // memories that were taken, and the owner
    bool cannot;         // pin: it has failed once, or there is nothing to pin it for
};

struct kvd_pinned *kvd_pinned_new(struct kvd_backend *backend, uint64_t keep)
{
    struct kvd_pinned *p = calloc(1, sizeof(*p));
    if (!p)
        return NULL;
    p->backend = backend;
    p->unpin = backend ? backend->ops->host_unpin : NULL;
    p->cannot = !backend;
    p->keep = keep;
    p->users = 1;
    pthread_mutex_init(&p->lock, NULL);
    return p;
}

// Memory that could not be pinned is not told apart: to unpin it does nothing.
static void drop(struct kvd_pinned *p, void *at)
{
    if (p->unpin)
        p->unpin(at);
    free(at);
}

static void drop_all(struct kvd_pinned *p, struct idle *idle)
{
    while (idle) {
        struct idle *next = idle->next;
        drop(p, idle);
        idle = next;
    }
}

static void leave(struct kvd_pinned *p)
{
    pthread_mutex_lock(&p->lock);
    bool last = --p->users == 0;
    pthread_mutex_unlock(&p->lock);
    if (!last)
        return;
    pthread_mutex_destroy(&p->lock);
    free(p);
}

void kvd_pinned_free(struct kvd_pinned **pp)
{
    struct kvd_pinned *p = KVD_TAKE(*pp);
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    struct idle *idle = KVD_TAKE(p->idle);
    p->keep = p->kept = 0;
    pthread_mutex_unlock(&p->lock);
    drop_all(p, idle);
    leave(p);
}

uint8_t *kvd_pinned_take(struct kvd_pinned *p, uint64_t bytes)
{
    struct kvd_error err = {0};
    pthread_mutex_lock(&p->lock);
    struct idle *found = p->idle;
    while (found && found->bytes != bytes)
        found = found->next;
    if (found) {
        DL_DELETE(p->idle, found);
        p->kept -= bytes;
    }
    bool pins = !p->cannot;
    pthread_mutex_unlock(&p->lock);
    uint8_t *at = found ? (uint8_t *)found : aligned_alloc(ALIGN, bytes);
    if (!at)
        return NULL;
    bool failed = !found && pins && p->backend->ops->host_pin(p->backend, at, bytes, &err);
    if (failed)
        kvd_warning("%s: blocks come back to the GPU more slowly", err.text);
    pthread_mutex_lock(&p->lock);
    p->users++;
    p->cannot |= failed;
    pthread_mutex_unlock(&p->lock);
    return at;
}

void kvd_pinned_give(struct kvd_pinned *p, uint8_t *at, uint64_t bytes)
{
    struct idle *idle = (struct idle *)(void *)at, *oldest, *out = NULL;
    pthread_mutex_lock(&p->lock);
    bool stays = bytes <= p->keep;
    while (stays && p->kept + bytes > p->keep) { // it may be of a size that nobody wants any more
        oldest = p->idle->prev;
        DL_DELETE(p->idle, oldest);
        p->kept -= oldest->bytes;
        oldest->next = out;
        out = oldest;
    }
    if (stays) {
        *idle = (struct idle){.bytes = bytes};
        DL_PREPEND(p->idle, idle);
        p->kept += bytes;
    }
    pthread_mutex_unlock(&p->lock);
    if (!stays)
        drop(p, at);
    drop_all(p, out);
    leave(p);
}

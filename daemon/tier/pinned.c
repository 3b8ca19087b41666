#include "daemon/tier/pinned.h"

#include <pthread.h>
#include <utlist.h>

#include "daemon/core/log.h"

enum {
    ALIGN = 4096,
    CHUNK_BYTES = 8 << 20,
    MOST_PIECES = 64,
};

// All chunks of pieces of one size.
struct size {
    uint64_t bytes;                 // of a piece
    struct kvd_pinned_chunk *roomy; // that have a free piece; the next one is of the first of them
    uint32_t chunks;
    struct size *next;
};

struct kvd_pinned_chunk {
    struct size *size;
    uint8_t *at;
    uint32_t pieces;
    bool pinned;
    uint64_t room;                                  // pieces that are free, as bits
    struct kvd_pinned_chunk *prev, *next;           // of its size, with room
    struct kvd_pinned_chunk *idle_prev, *idle_next; // with nothing taken
};

struct kvd_pinned {
    struct kvd_backend *backend; // NULL: does not pin
    void (*unpin)(void *at);     // the same
    pthread_mutex_t lock;
    struct size *sizes;
    struct kvd_pinned_chunk *idle; // the one that became so last first
    uint64_t kept, keep;           // bytes of those
    uint64_t users;                // memories that were taken, and the owner
    bool cannot;                   // pin: it has failed once, or there is nothing to pin it for
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

static uint64_t all_of(const struct kvd_pinned_chunk *c)
{
    return UINT64_MAX >> (MOST_PIECES - c->pieces);
}

static uint64_t bytes_of(const struct kvd_pinned_chunk *c)
{
    return c->pieces * c->size->bytes;
}

// -- chunks -------------------------------------------------------------------------------------

// Memory that is in no list.
static void drop(struct kvd_pinned *p, uint8_t *at, bool pinned)
{
    if (pinned)
        p->unpin(at);
    free(at);
}

// Those that `take_out` has collected, without the lock: to unpin takes long.
static void drop_all(struct kvd_pinned *p, struct kvd_pinned_chunk *out)
{
    while (out) {
        struct kvd_pinned_chunk *next = out->next;
        drop(p, out->at, out->pinned);
        free(out);
        out = next;
    }
}

// Of the lists; nothing of it is taken, and it is not among the idle ones.
static void take_out(struct kvd_pinned *p, struct kvd_pinned_chunk *c,
                     struct kvd_pinned_chunk **out)
{
    struct size *size = c->size;
    DL_DELETE(size->roomy, c);
    c->next = *out;
    *out = c;
    if (--size->chunks)
        return;
    LL_DELETE(p->sizes, size);
    free(size);
}

static void stop_idling(struct kvd_pinned *p, struct kvd_pinned_chunk *c)
{
    DL_DELETE2(p->idle, c, idle_prev, idle_next);
    p->kept -= bytes_of(c);
}

// Nothing of it is taken any more.
static void become_idle(struct kvd_pinned *p, struct kvd_pinned_chunk *c,
                        struct kvd_pinned_chunk **out)
{
    if (bytes_of(c) > p->keep) {
        take_out(p, c, out);
        return;
    }
    while (p->kept + bytes_of(c) > p->keep) { // they may be of a size that nobody wants any more
        struct kvd_pinned_chunk *oldest = p->idle->idle_prev;
        stop_idling(p, oldest);
        take_out(p, oldest, out);
    }
    DL_PREPEND2(p->idle, c, idle_prev, idle_next);
    p->kept += bytes_of(c);
}

static struct size *size_of(const struct kvd_pinned *p, uint64_t bytes)
{
    struct size *size = p->sizes;
    while (size && size->bytes != bytes)
        size = size->next;
    return size;
}

static uint8_t *take_piece(struct kvd_pinned *p, struct kvd_pinned_chunk *c)
{
    if (c->room == all_of(c))
        stop_idling(p, c);
    uint32_t piece = (uint32_t)__builtin_ctzll(c->room);
    c->room &= c->room - 1;
    if (!c->room)
        DL_DELETE(c->size->roomy, c);
    p->users++;
    return c->at + piece * c->size->bytes;
}

// A new one, in no list. NULL: out of memory.
static struct kvd_pinned_chunk *make(struct kvd_pinned *p, uint64_t bytes, bool pins)
{
    struct kvd_error err = {0};
    struct kvd_pinned_chunk *c = calloc(1, sizeof(*c));
    uint64_t pieces = pins ? CHUNK_BYTES / bytes : 1;
    if (!c)
        return NULL;
    c->pieces = (uint32_t)KVD_MIN(KVD_MAX(pieces, 1u), (uint64_t)MOST_PIECES);
    c->at = aligned_alloc(ALIGN, c->pieces * bytes);
    if (!c->at) {
        free(c);
        return NULL;
    }
    c->room = all_of(c);
    c->pinned = pins && p->backend->ops->host_pin(p->backend, c->at, c->pieces * bytes, &err) == 0;
    if (pins && !c->pinned)
        kvd_warning("%s: blocks come back to the GPU more slowly", err.text);
    return c;
}

// It is an idle one for a moment. False: out of memory.
static bool add(struct kvd_pinned *p, struct kvd_pinned_chunk *c, uint64_t bytes)
{
    struct size *size = size_of(p, bytes);
    if (!size) {
        size = calloc(1, sizeof(*size));
        if (!size)
            return false;
        size->bytes = bytes;
        LL_PREPEND(p->sizes, size);
    }
    size->chunks++;
    c->size = size;
    DL_APPEND(size->roomy, c);
    DL_PREPEND2(p->idle, c, idle_prev, idle_next);
    p->kept += bytes_of(c);
    return true;
}

// -- taking and giving --------------------------------------------------------------------------

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
    struct kvd_pinned_chunk *out = NULL;
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    while (p->idle) {
        struct kvd_pinned_chunk *c = p->idle;
        stop_idling(p, c);
        take_out(p, c, &out);
    }
    p->keep = 0;
    pthread_mutex_unlock(&p->lock);
    drop_all(p, out);
    leave(p);
}

void kvd_pinned_stop(struct kvd_pinned *p)
{
    pthread_mutex_lock(&p->lock);
    p->cannot = true;
    pthread_mutex_unlock(&p->lock);
}

uint8_t *kvd_pinned_take(struct kvd_pinned *p, uint64_t bytes, struct kvd_pinned_chunk **chunk)
{
    pthread_mutex_lock(&p->lock);
    struct size *size = size_of(p, bytes);
    struct kvd_pinned_chunk *c = size ? size->roomy : NULL;
    uint8_t *at = c ? take_piece(p, c) : NULL;
    bool pins = !p->cannot;
    pthread_mutex_unlock(&p->lock);
    *chunk = c;
    if (c)
        return at;
    c = make(p, bytes, pins);
    if (!c)
        return NULL;
    pthread_mutex_lock(&p->lock);
    p->cannot |= !c->pinned;
    if (add(p, c, bytes))
        at = take_piece(p, c);
    pthread_mutex_unlock(&p->lock);
    if (at) {
        *chunk = c;
    } else {
        drop(p, c->at, c->pinned);
        free(c);
    }
    return at;
}

void kvd_pinned_give(struct kvd_pinned *p, struct kvd_pinned_chunk *c, uint8_t *at)
{
    struct kvd_pinned_chunk *out = NULL;
    pthread_mutex_lock(&p->lock);
    if (!c->room)
        DL_APPEND(c->size->roomy, c);
    c->room |= UINT64_C(1) << (uint64_t)(at - c->at) / c->size->bytes;
    if (c->room == all_of(c))
        become_idle(p, c, &out);
    pthread_mutex_unlock(&p->lock);
    drop_all(p, out);
    leave(p);
}

uint64_t kvd_pinned_place(const struct kvd_pinned_chunk *chunk)
{
    return chunk->pinned ? (uintptr_t)chunk->at : 0;
}

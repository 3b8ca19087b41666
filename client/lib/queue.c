// Queues of page calls: a thread each, which does what the public functions do, in order.
//
// A ticket is in one of three places, under the queue's lock: the list of those that wait, `begun`,
// the list of those that have ended. The eventfd counts 1 while the last of these is not empty.
#include <errno.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "client/lib/client.h"
#include "client/lib/paged.h"

enum { TICKETS = 256, MOST_TICKETS = 4096, ALIGNED = 8 };

struct ticket {
    struct ticket *next;
    uint64_t number;
    bool get;
    kvd_bytes space;
    kvd_page_keys keys;
    const bool *exact;
    kvd_paged paged;
    uint8_t *kinds; // the program's
    struct kvd_gpu_mark mark;
    kvd_ended ended;
    _Alignas(ALIGNED) uint8_t copied[]; // of what the program gave
};

struct list {
    struct ticket *first, *last;
};

struct kvd_queue {
    kvd_client *client;
    kvd_queue *next; // of the client's
    int fd;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t work, over;
    struct list waiting, ended;
    struct ticket *begun;
    uint32_t n, most; // tickets in the three places
    uint64_t latest;  // number of the ticket that was queued last
    bool stop;
    void *stream; // of the GPU, the thread's own
};

// -- tickets ------------------------------------------------------------------------------------

static void push(struct list *l, struct ticket *t)
{
    t->next = NULL;
    if (l->first)
        l->last->next = t;
    else
        l->first = t;
    l->last = t;
}

static struct ticket *pop(struct list *l)
{
    struct ticket *t = l->first;
    if (t)
        l->first = t->next;
    return t;
}

static void ticket_free(struct ticket *t)
{
    kvd_gpu_mark_free(&t->mark);
    free(t);
}

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
}

static void *copy(uint8_t **to, const void *from, size_t bytes)
{
    void *at = from ? memcpy(*to, from, bytes) : NULL;
    *to += from ? aligned(bytes) : 0;
    return at;
}

// Has its own copy of all that the program gave, but for kinds and the engine's blocks.
static struct ticket *ticket_new(const kvd_client *c, const kvd_bytes *space,
                                 const kvd_page_keys *keys, const bool *exact,
                                 const kvd_paged *paged)
{
    const size_t names = (size_t)keys->pages * keys->key_bytes;
    const size_t bases = c->layout.n_layers * sizeof(void *);
    const uint32_t blocks = (uint32_t)kvd_div_up(
        paged->first_token + (uint64_t)keys->pages * KVD_PAGE_TOKENS, paged->block_tokens);
    struct ticket *t = calloc(1, sizeof(*t) + aligned(space->bytes) + aligned(names) +
                                     aligned(keys->key_bytes) + 2 * aligned(keys->pages) +
                                     2 * aligned(bases) + aligned(blocks * sizeof(uint32_t)));
    if (!t)
        return NULL;
    uint8_t *at = t->copied;
    t->space = (kvd_bytes){copy(&at, space->data, space->bytes), space->bytes};
    t->keys = *keys;
    t->keys.keys = copy(&at, keys->keys, names);
    t->keys.after = copy(&at, keys->after, keys->key_bytes);
    t->keys.had = copy(&at, keys->had, keys->pages);
    t->exact = copy(&at, exact, keys->pages);
    t->paged = *paged;
    t->paged.k = copy(&at, paged->k, bases);
    t->paged.v = copy(&at, paged->v, bases);
    t->paged.blocks = copy(&at, paged->blocks, blocks * sizeof(uint32_t));
    t->paged.n_blocks = blocks;
    return t;
}

// -- the thread ---------------------------------------------------------------------------------

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void carry_out(kvd_queue *q, struct ticket *t)
{
    const uint64_t began = now_us();
    kvd_failure *err = &t->ended.failure;
    struct kvd_error e = {0};
    if (t->mark.event && kvd_gpu_follow(&t->mark, &q->stream, &e)) {
        t->ended.result = kvd_client_fail(err, &e);
    } else {
        t->paged.stream = q->stream;
        t->ended.result =
            t->get
                ? kvd_pages_get(q->client, &t->space, &t->keys, &t->paged, t->kinds, err)
                : kvd_pages_put(q->client, &t->space, &t->keys, t->exact, &t->paged, t->kinds, err);
    }
    t->ended.us = KVD_MAX(now_us() - began, (uint64_t)1);
}

static void end(kvd_queue *q, struct ticket *t)
{
    const uint64_t one = 1;
    if (!q->ended.first)
        (void)!write(q->fd, &one, sizeof(one)); // it counts 0, so there is room
    push(&q->ended, t);
    pthread_cond_broadcast(&q->over);
}

// Those that wait would find the same, each after a timeout perhaps.
static bool ends_all(kvd_result rc)
{
    return rc == KVD_ERR_UNAVAILABLE || rc == KVD_ERR_TIMEOUT || rc == KVD_ERR_LOST;
}

static void *run(void *ctx)
{
    kvd_queue *q = ctx;
    pthread_mutex_lock(&q->lock);
    while (!q->stop) {
        struct ticket *t = q->begun = pop(&q->waiting);
        if (!t) {
            pthread_cond_wait(&q->work, &q->lock);
            continue;
        }
        pthread_mutex_unlock(&q->lock);
        carry_out(q, t);
        pthread_mutex_lock(&q->lock);
        q->begun = NULL;
        end(q, t);
        for (struct ticket *other; ends_all(t->ended.result) && (other = pop(&q->waiting));) {
            other->ended.result = t->ended.result;
            other->ended.failure = t->ended.failure;
            end(q, other);
        }
    }
    pthread_mutex_unlock(&q->lock);
    return NULL;
}

// -- queues -------------------------------------------------------------------------------------

static void queue_free(kvd_queue *q)
{
    struct ticket *t;
    while ((t = pop(&q->waiting)) || (t = pop(&q->ended)))
        ticket_free(t);
    kvd_gpu_stream_free(&q->stream);
    if (q->fd >= 0)
        close(q->fd);
    free(q);
}

static int queue_start(kvd_queue *q, struct kvd_error *err)
{
    q->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (q->fd < 0)
        return kvd_fail(err, KVD_E_INTERNAL, "the eventfd of a queue: %s", strerror(errno));
    pthread_mutex_init(&q->lock, NULL);
    kvd_cond_init(&q->work);
    kvd_cond_init(&q->over);
    if (pthread_create(&q->thread, NULL, run, q) == 0)
        return KVD_OK;
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->work);
    pthread_cond_destroy(&q->over);
    return kvd_fail(err, KVD_E_INTERNAL, "a queue's thread could not be started");
}

kvd_result kvd_queue_new(kvd_client *c, uint32_t tickets, kvd_queue **out, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "out", out);
    struct kvd_error e = {0};
    int rc = kvd_fork_check(c, &e);
    if (rc == KVD_OK)
        rc = kvd_pages_check_client(c, &e);
    if (rc == KVD_OK && tickets > MOST_TICKETS)
        rc = kvd_fail(&e, KVD_E_INVALID, "%u tickets; at most %d are possible", tickets,
                      MOST_TICKETS);
    if (rc)
        return kvd_client_fail(err, &e);
    kvd_queue *q = calloc(1, sizeof(*q));
    if (!q) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    q->client = c;
    q->most = tickets ? tickets : TICKETS;
    if (queue_start(q, &e)) {
        queue_free(q);
        return kvd_client_fail(err, &e);
    }
    pthread_mutex_lock(&c->buffers_lock);
    q->next = c->queues;
    c->queues = q;
    pthread_mutex_unlock(&c->buffers_lock);
    *out = q;
    return KVD_SUCCESS;
}

// In a forked child there is no other thread, and nobody knows who held a lock when it was forked.

static void unlink_queue(kvd_queue *q)
{
    kvd_client *c = q->client;
    if (!c->forked)
        pthread_mutex_lock(&c->buffers_lock);
    for (kvd_queue **link = &c->queues; *link; link = &(*link)->next)
        if (*link == q) {
            *link = q->next;
            break;
        }
    if (!c->forked)
        pthread_mutex_unlock(&c->buffers_lock);
}

static void queue_end(kvd_queue *q)
{
    if (q->client->forked) {
        free(KVD_TAKE(q->begun));
        queue_free(q);
        return;
    }
    pthread_mutex_lock(&q->lock);
    q->stop = true;
    pthread_cond_broadcast(&q->work);
    pthread_mutex_unlock(&q->lock);
    pthread_join(q->thread, NULL);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->work);
    pthread_cond_destroy(&q->over);
    queue_free(q);
}

void kvd_queue_free(kvd_queue **qp)
{
    kvd_queue *q = qp ? KVD_TAKE(*qp) : NULL;
    if (!q)
        return;
    unlink_queue(q);
    queue_end(q);
}

void kvd_queues_drop(kvd_client *c)
{
    while (c->queues) {
        kvd_queue *q = c->queues;
        c->queues = q->next;
        queue_end(q);
    }
}

// -- calls --------------------------------------------------------------------------------------

static kvd_result add(kvd_queue *q, struct ticket *t, uint64_t *number, kvd_failure *err)
{
    struct kvd_error e = {0};
    pthread_mutex_lock(&q->lock);
    bool room = q->n < q->most;
    if (room) {
        t->number = t->ended.ticket = ++q->latest;
        if (number)
            *number = t->number;
        q->n++;
        push(&q->waiting, t);
        pthread_cond_signal(&q->work);
    }
    pthread_mutex_unlock(&q->lock);
    if (room)
        return KVD_SUCCESS;
    ticket_free(t);
    kvd_fail(&e, KVD_E_LIMIT,
             "the queue has %u tickets, as many as it may: poll those that have ended, or wait",
             q->most);
    return kvd_client_fail(err, &e);
}

static kvd_result submit(kvd_queue *q, bool get, const kvd_bytes *space, const kvd_page_keys *keys,
                         const bool *exact, const kvd_paged *paged, uint8_t *kinds,
                         uint64_t *number, kvd_failure *err)
{
    kvd_page_keys k;
    kvd_paged p;
    struct kvd_error e = {0};
    if (kvd_fork_check(q->client, &e) ||
        kvd_pages_take(q->client, space, keys, paged, get, &k, &p, &e))
        return kvd_client_fail(err, &e);
    struct ticket *t = ticket_new(q->client, space, &k, exact, &p);
    if (!t) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    t->get = get;
    t->kinds = kinds;
    if (p.on_gpu && kvd_gpu_mark(&p, &t->mark, &e)) {
        ticket_free(t);
        return kvd_client_fail(err, &e);
    }
    return add(q, t, number, err);
}

kvd_result kvd_queue_put(kvd_queue *q, const kvd_bytes *space, const kvd_page_keys *keys,
                         const bool *exact, const kvd_paged *source, uint8_t *kinds,
                         uint64_t *ticket, kvd_failure *err)
{
    KVD_WANT(err, "queue", q, "space", space, "keys", keys, "source", source);
    return submit(q, false, space, keys, exact, source, kinds, ticket, err);
}

kvd_result kvd_queue_get(kvd_queue *q, const kvd_bytes *space, const kvd_page_keys *keys,
                         const kvd_paged *target, uint8_t *kinds, uint64_t *ticket,
                         kvd_failure *err)
{
    KVD_WANT(err, "queue", q, "space", space, "keys", keys, "target", target);
    return submit(q, true, space, keys, NULL, target, kinds, ticket, err);
}

kvd_result kvd_queue_fd(kvd_queue *q, int *fd, kvd_failure *err)
{
    KVD_WANT(err, "queue", q, "fd", fd);
    struct kvd_error e = {0};
    if (kvd_fork_check(q->client, &e))
        return kvd_client_fail(err, &e);
    *fd = q->fd;
    return KVD_SUCCESS;
}

kvd_result kvd_queue_poll(kvd_queue *q, kvd_ended *out, uint32_t count, uint32_t *n,
                          kvd_failure *err)
{
    KVD_WANT(err, "queue", q, "out", out, "n", n);
    struct kvd_error e = {0};
    uint32_t step, given = 0;
    uint64_t one;
    memcpy(&step, out, sizeof(step));
    int rc = kvd_fork_check(q->client, &e);
    if (rc == KVD_OK && !count)
        rc = kvd_fail(&e, KVD_E_INVALID, "there is room for none; 1 or more are wanted");
    for (uint32_t i = 0; i < count && rc == KVD_OK; i++)
        rc = kvd_sized_check(&kvd_sized_ended, (const uint8_t *)out + (size_t)i * step, &e);
    if (rc)
        return kvd_client_fail(err, &e);
    struct list told = {0};
    pthread_mutex_lock(&q->lock);
    const bool some = q->ended.first;
    for (; given < count && q->ended.first; given++)
        push(&told, pop(&q->ended));
    q->n -= given;
    if (some && !q->ended.first)
        (void)!read(q->fd, &one, sizeof(one)); // it counts 1
    pthread_mutex_unlock(&q->lock);
    struct ticket *t;
    for (uint32_t i = 0; (t = pop(&told)); i++) {
        kvd_sized_give(&kvd_sized_ended, &t->ended, (uint8_t *)out + (size_t)i * step);
        ticket_free(t);
    }
    *n = given;
    return KVD_SUCCESS;
}

// Whether a ticket waits or has begun. Under the lock.
static bool under_way(const kvd_queue *q, uint64_t number)
{
    if (q->begun && q->begun->number == number)
        return true;
    const struct ticket *t = q->waiting.first;
    while (t && t->number != number)
        t = t->next;
    return t;
}

static int check_number(const kvd_queue *q, uint64_t number, struct kvd_error *err)
{
    return number >= 1 && number <= q->latest
               ? KVD_OK
               : kvd_fail(err, KVD_E_INVALID, "ticket %llu; the queue has had 1 to %llu",
                          (unsigned long long)number, (unsigned long long)q->latest);
}

kvd_result kvd_queue_wait(kvd_queue *q, uint64_t ticket, uint32_t ms, kvd_failure *err)
{
    KVD_WANT(err, "queue", q);
    struct kvd_error e = {0};
    const uint64_t until = kvd_now_ms() + ms;
    if (kvd_fork_check(q->client, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&q->lock);
    int rc = check_number(q, ticket, &e);
    while (rc == KVD_OK && under_way(q, ticket))
        if (!kvd_cond_wait(&q->over, &q->lock, until) && under_way(q, ticket))
            rc = kvd_fail(&e, KVD_E_TIMEOUT, "ticket %llu is not over after %u ms",
                          (unsigned long long)ticket, ms);
    pthread_mutex_unlock(&q->lock);
    return rc ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

kvd_result kvd_queue_cancel(kvd_queue *q, uint64_t ticket, kvd_failure *err)
{
    KVD_WANT(err, "queue", q);
    struct kvd_error e = {0};
    struct list kept = {0};
    struct ticket *taken = NULL, *t;
    if (kvd_fork_check(q->client, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&q->lock);
    int rc = check_number(q, ticket, &e);
    while (rc == KVD_OK && (t = pop(&q->waiting)))
        if (t->number == ticket)
            taken = t;
        else
            push(&kept, t);
    if (rc == KVD_OK)
        q->waiting = kept;
    if (rc == KVD_OK && !taken)
        rc = kvd_fail(&e, KVD_E_PRECONDITION, "ticket %llu has begun, or is over",
                      (unsigned long long)ticket);
    if (taken) {
        q->n--;
        pthread_cond_broadcast(&q->over);
    }
    pthread_mutex_unlock(&q->lock);
    if (rc)
        return kvd_client_fail(err, &e);
    ticket_free(taken);
    return KVD_SUCCESS;
}

// Calls in the order of a CUDA stream.
//
// A call is sent at once, with two counters of a shared page: the stream writes the first when it
// has got so far, which kvd waits for, and itself waits for the second, which kvd writes when
// outputs are there. A few threads send, so that the next calls are with kvd before their turn.
// Each stream has a lane of counters; a call that fails moves its lane on all the same.
#include <stdatomic.h>

#include "client/lib/client.h"

enum {
    LANES = 16,
    LANE_BYTES = 128, // two cache lines: what the stream writes, what kvd writes
    SENDERS = 4,
    MAX_JOBS = 256,
};

struct job {
    struct job *next;
    kvd_call_kind kind;
    kvd_layers layers;
    kvd_attention attention;
    uint32_t lane, value, count;
    kvd_item items[];
};

struct lane {
    void *stream;
    bool used;
    uint32_t value;
};

struct kvd_enqueuer {
    kvd_client *client;
    kvd_buffer *words;
    uint64_t device; // address of the words on the GPU
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct lane lanes[LANES];
    struct job *first, *last;
    uint32_t pending; // queued or being sent
    bool stop;
    uint64_t close_by; // when what is queued has to be sent; until closing far away
    pthread_t threads[SENDERS];
    uint32_t n_threads;
    kvd_failure failure; // the first since it was asked for
};

static _Atomic uint32_t *word_of(struct kvd_enqueuer *q, uint32_t lane, bool out)
{
    uint8_t *base = kvd_buffer_data(q->words);
    return (_Atomic uint32_t *)(void *)(base + lane * LANE_BYTES + (out ? LANE_BYTES / 2 : 0));
}

static Kvd__V1__Fence fence_of(struct kvd_enqueuer *q, const struct job *job, bool out)
{
    Kvd__V1__Fence f = KVD__V1__FENCE__INIT;
    f.buffer = q->words->id;
    f.offset = job->lane * LANE_BYTES + (out ? LANE_BYTES / 2 : 0);
    f.value = job->value;
    return f;
}

static void send_job(struct kvd_enqueuer *q, struct job *job)
{
    kvd_failure failure;
    pthread_mutex_lock(&q->lock);
    uint64_t deadline = KVD_MIN(kvd_client_deadline(q->client), q->close_by);
    pthread_mutex_unlock(&q->lock);
    Kvd__V1__Fence wait = fence_of(q, job, false), signal = fence_of(q, job, true);
    kvd_result rc = kvd_client_compute(q->client, job->kind, job->layers, &job->attention,
                                       job->items, job->count, &wait, &signal, deadline, &failure);
    pthread_mutex_lock(&q->lock);
    if (rc) {
        // Whatever went wrong, the stream must not wait for ever.
        atomic_store(word_of(q, job->lane, true), job->value);
        if (!q->failure.code)
            q->failure = failure;
    }
    q->pending--;
    pthread_cond_broadcast(&q->done);
    pthread_mutex_unlock(&q->lock);
    free(job);
}

static void *run(void *ctx)
{
    struct kvd_enqueuer *q = ctx;
    pthread_mutex_lock(&q->lock);
    while (q->first || !q->stop) {
        struct job *job = q->first;
        if (!job) {
            pthread_cond_wait(&q->work, &q->lock);
            continue;
        }
        q->first = job->next;
        if (!q->first)
            q->last = NULL;
        pthread_mutex_unlock(&q->lock);
        send_job(q, job);
        pthread_mutex_lock(&q->lock);
    }
    pthread_mutex_unlock(&q->lock);
    return NULL;
}

// The lane of a stream, or LANES.
static uint32_t lane_of(struct kvd_enqueuer *q, void *stream)
{
    for (uint32_t i = 0; i < LANES; i++) {
        if (q->lanes[i].used && q->lanes[i].stream != stream)
            continue;
        q->lanes[i].used = true;
        q->lanes[i].stream = stream;
        return i;
    }
    return LANES;
}

void kvd_enqueuer_free(struct kvd_enqueuer **qp, uint64_t deadline)
{
    struct kvd_enqueuer *q = KVD_TAKE(*qp);
    if (!q)
        return;
    pthread_mutex_lock(&q->lock);
    q->stop = true;
    q->close_by = deadline;
    pthread_cond_broadcast(&q->work);
    pthread_mutex_unlock(&q->lock);
    for (uint32_t i = 0; i < q->n_threads; i++)
        pthread_join(q->threads[i], NULL);
    if (q->words)
        kvd_gpu_unmap(kvd_buffer_data(q->words));
    kvd_buffer_take(&q->words, deadline, true);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->work);
    pthread_cond_destroy(&q->done);
    free(q);
}

static kvd_result enqueuer_new(kvd_client *c, kvd_failure *err)
{
    struct kvd_error e = {0};
    struct kvd_enqueuer *q = calloc(1, sizeof(*q));
    if (!q) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    q->client = c;
    pthread_mutex_init(&q->lock, NULL);
    kvd_cond_init(&q->work);
    kvd_cond_init(&q->done);
    q->close_by = UINT64_MAX;
    kvd_result rc = kvd_buffer_new(c, 4096, &q->words, err);
    if (rc == KVD_SUCCESS && kvd_gpu_map(kvd_buffer_data(q->words), 4096, &q->device, &e))
        rc = kvd_client_fail(err, &e);
    for (uint32_t i = 0; i < SENDERS && rc == KVD_SUCCESS; i++) {
        if (pthread_create(&q->threads[i], NULL, run, q) == 0) {
            q->n_threads++;
        } else if (i == 0) {
            kvd_fail(&e, KVD_E_INTERNAL, "cannot start a thread");
            rc = kvd_client_fail(err, &e);
        }
    }
    if (rc)
        kvd_enqueuer_free(&q, kvd_client_deadline(c));
    c->enqueuer = q;
    return rc;
}

// Hands a job over, and its two operations to the stream. The caller holds the lock.
static int hand_over(struct kvd_enqueuer *q, void *stream, struct job *job, struct kvd_error *err)
{
    job->lane = lane_of(q, stream);
    if (job->lane == LANES)
        return kvd_fail(err, KVD_E_LIMIT, "a client takes calls from at most %d streams", LANES);
    uint64_t deadline = kvd_client_deadline(q->client);
    while (q->pending >= MAX_JOBS)
        if (!kvd_cond_wait(&q->done, &q->lock, deadline))
            return kvd_fail(err, KVD_E_TIMEOUT, "%d calls are under way and none was answered",
                            MAX_JOBS);
    job->value = q->lanes[job->lane].value + 1;
    uint64_t at = q->device + job->lane * LANE_BYTES;
    int rc = kvd_gpu_order(stream, at, at + LANE_BYTES / 2, job->value, err);
    if (rc)
        return rc;
    q->lanes[job->lane].value++;
    job->next = NULL;
    if (q->last)
        q->last->next = job;
    else
        q->first = job;
    q->last = job;
    q->pending++;
    pthread_cond_signal(&q->work);
    return KVD_OK;
}

kvd_result kvd_enqueue(kvd_client *c, void *stream, kvd_call_kind kind, kvd_layers layers,
                       const kvd_attention *attention, const kvd_item *items, uint32_t count,
                       kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    struct kvd_error e = {0};
    kvd_item *own KVD_FREE = NULL;
    kvd_attention a = {0};
    if (kvd_items_take(items, count, &own, &e) ||
        (attention && kvd_sized_take(&kvd_sized_attention, attention, &a, &e)) ||
        kvd_check_compute(c, kind, layers, &a, own, count, &e))
        return kvd_client_fail(err, &e);
    if (kvd_fork_check(c, &e))
        return kvd_client_fail(err, &e);
    kvd_items_name(c, kind, own, count);
    if (c->remote && !c->on_cpu) {
        kvd_fail(&e, KVD_E_UNSUPPORTED, "calls in a stream's order want kvd's unix: address");
        return kvd_client_fail(err, &e);
    }
    if (c->on_cpu)
        return kvd_client_compute(c, kind, layers, &a, own, count, NULL, NULL,
                                  kvd_client_deadline(c), err);
    pthread_mutex_lock(&c->enqueuer_lock);
    kvd_result made = c->enqueuer ? KVD_SUCCESS : enqueuer_new(c, err);
    pthread_mutex_unlock(&c->enqueuer_lock);
    if (made)
        return made;
    struct job *job = malloc(sizeof(*job) + count * sizeof(*own));
    if (!job) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    *job = (struct job){.kind = kind, .layers = layers, .attention = a, .count = count};
    memcpy(job->items, own, count * sizeof(*own));
    pthread_mutex_lock(&c->enqueuer->lock);
    int rc = hand_over(c->enqueuer, stream, job, &e);
    pthread_mutex_unlock(&c->enqueuer->lock);
    if (rc == KVD_OK)
        return KVD_SUCCESS;
    free(job);
    return kvd_client_fail(err, &e);
}

kvd_result kvd_enqueued(kvd_client *c, kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    struct kvd_error e = {0};
    uint64_t deadline = kvd_client_deadline(c);
    if (kvd_fork_check(c, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&c->enqueuer_lock);
    struct kvd_enqueuer *q = c->enqueuer;
    pthread_mutex_unlock(&c->enqueuer_lock);
    if (!q)
        return KVD_SUCCESS;
    pthread_mutex_lock(&q->lock);
    while (q->pending && kvd_left_ms(deadline))
        kvd_cond_wait(&q->done, &q->lock, deadline);
    if (q->pending) {
        kvd_fail(&e, KVD_E_TIMEOUT, "%u calls have not been answered", q->pending);
        pthread_mutex_unlock(&q->lock);
        return kvd_client_fail(err, &e);
    }
    kvd_failure failure = q->failure;
    q->failure.code = KVD_SUCCESS;
    pthread_mutex_unlock(&q->lock);
    if (failure.code && err)
        *err = failure;
    return failure.code;
}

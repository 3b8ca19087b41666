// Direct mode: steps, views, and the thread that brings tokens to kvd.
//
// A slot's tokens are [0, stored) in kvd's pages and [stored, length) in the tail. A *view* is what
// kernels see of kvd's pages: (stored, hist_end) and a page table. The thread appends whole chunks
// from the tail and fetches the new view; the next step adopts it.
//
// An old view stays good while kvd goes on: new history lies beyond its end, and the ring has
// KVD_RING_SLACK slots that the view's tokens do not use. So the thread never appends more than
// MAX_AHEAD tokens beyond the oldest view that a kernel may still use.
#include <errno.h>

#include "client/lib/direct.h"
#include "proto/overlap.h"

enum {
    // ring - recent - the up to 15 tokens more that a window has
    MAX_AHEAD = (KVD_RING_SLACK - 15) / KVD_CHUNK_TOKENS * KVD_CHUNK_TOKENS,
    IDLE_MS = 1000, // between looks at the fd socket when nothing happens
};

// -- the thread ---------------------------------------------------------------------------------

// `stored` of the oldest view that a kernel may still use.
static uint64_t oldest_view(struct kvd_direct *d, const struct direct_slot *s)
{
    return d->ops->passed(d, KVD_DIRECT_ADOPTED) ? s->now.stored : s->older;
}

// How far a slot may be appended now: up to the end of a run in the tail's ring.
static uint64_t append_to(struct kvd_direct *d, const struct direct_slot *s)
{
    uint64_t to = s->written;
    if (!d->quiet)
        to = KVD_MIN(to, oldest_view(d, s) + MAX_AHEAD);
    uint64_t run_end = (s->appended / d->ring + 1) * d->ring;
    to = KVD_MIN(to, run_end);
    // Part of a chunk only when it is all there is: at a flush.
    return to == s->written ? to : to / KVD_CHUNK_TOKENS * KVD_CHUNK_TOKENS;
}

static kvd_item item_of(const struct kvd_direct *d, uint32_t slot, uint64_t to)
{
    const struct direct_slot *s = &d->slots[slot];
    kvd_item item = {.size = sizeof(item),
                     .sequence = s->sequence,
                     .position = s->appended,
                     .tokens = (uint32_t)(to - s->appended),
                     .request = s->request};
    for (int v = 0; v < 2; v++) {
        uint64_t row = direct_row_bytes(d, v);
        uint64_t at = (uint64_t)slot * d->ring + s->appended % d->ring;
        *(v ? &item.v : &item.k) =
            (kvd_tensor_ref){.buffer = d->tail,
                             .offset = direct_layer_at(d, 0, v) + at * row,
                             .layer_stride = direct_layer_at(d, 1, v) - direct_layer_at(d, 0, v)};
    }
    return item;
}

// Collects what can be appended now. *blocked: some slot waits for its kernels to take up a view.
static uint32_t collect(struct kvd_direct *d, uint32_t *list, kvd_item *items, bool *blocked)
{
    uint32_t n = 0;
    *blocked = false;
    for (uint32_t i = 0; i < d->options.slots; i++) {
        struct direct_slot *s = &d->slots[i];
        if (!s->sequence || s->appended >= s->written)
            continue;
        uint64_t to = s->sent ? s->sent : append_to(d, s);
        if (to <= s->appended) {
            *blocked = true;
            continue;
        }
        if (!s->sent) {
            s->sent = to; // and sent again as it is until it is known to be there
            s->request = kvd_request_new(d->client);
        }
        list[n] = i;
        items[n++] = item_of(d, i, to);
    }
    return n;
}

// Appends one batch and fetches its new views. The lock is released meanwhile.
static int append_batch(struct kvd_direct *d, const uint32_t *list, const kvd_item *items,
                        uint32_t n, struct kvd_error *err)
{
    kvd_failure failure = {0};
    kvd_attention none = {0};
    uint64_t deadline = KVD_MIN(kvd_client_deadline(d->client), d->close_by);
    d->busy = true;
    pthread_mutex_unlock(&d->lock);
    int rc = kvd_direct_read_socket(d, err); // is the session still the same?
    if (rc == KVD_OK && kvd_client_compute(d->client, KVD_CALL_APPEND, (kvd_layers){0, 0}, &none,
                                           items, n, NULL, NULL, deadline, &failure))
        rc = kvd_client_failed(&failure, err);
    if (rc == KVD_OK)
        rc = kvd_direct_map(d, list, n, deadline, err);
    pthread_mutex_lock(&d->lock);
    d->busy = false;
    for (uint32_t i = 0; i < n && rc == KVD_OK; i++) {
        d->slots[list[i]].appended = items[i].position + items[i].tokens;
        d->slots[list[i]].sent = 0;
    }
    return rc;
}

// Appends what can be appended now. False: nothing can.
static bool append_some(struct kvd_direct *d, bool *blocked)
{
    struct kvd_error err = {0};
    uint32_t n = collect(d, d->list, d->items, blocked);
    if (n == 0)
        return false;
    if (append_batch(d, d->list, d->items, n, &err)) {
        d->failure = err;
        pthread_cond_broadcast(&d->progress);
        while (d->failure.code && !d->stop) // until somebody has heard of it
            pthread_cond_wait(&d->work, &d->lock);
    }
    pthread_cond_broadcast(&d->progress);
    return true;
}

// Takes the first mark, waits until it has passed, and notes what is written.
static void take_job(struct kvd_direct *d)
{
    struct direct_job *job = &d->jobs[d->first_job];
    struct kvd_error err = {0};
    pthread_mutex_unlock(&d->lock);
    int rc = d->ops->wait(d, job->mark, &err);
    pthread_mutex_lock(&d->lock);
    for (uint32_t i = 0; i < d->options.slots; i++)
        if (d->slots[i].sequence && rc == KVD_OK)
            d->slots[i].written = KVD_MAX(d->slots[i].written, job->targets[i]);
    d->first_job = (d->first_job + 1) % KVD_DIRECT_JOBS;
    d->n_jobs--;
    if (rc)
        d->failure = err;
    pthread_cond_broadcast(&d->progress);
}

static void *run(void *ctx)
{
    struct kvd_direct *d = ctx;
    pthread_mutex_lock(&d->lock);
    while (!d->stop) {
        bool blocked;
        if (d->n_jobs)
            take_job(d);
        if (append_some(d, &blocked) || d->n_jobs || d->stop)
            continue;
        kvd_cond_wait(&d->work, &d->lock, kvd_now_ms() + (blocked ? 1 : IDLE_MS));
        if (blocked || d->n_jobs || d->stop)
            continue;
        pthread_mutex_unlock(&d->lock);
        kvd_direct_read_socket(d, NULL); // extents that are taken back
        pthread_mutex_lock(&d->lock);
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

// -- steps --------------------------------------------------------------------------------------

// The latest append's failure, once. The caller holds the lock.
static int hear_failure(struct kvd_direct *d, struct kvd_error *err)
{
    if (!d->failure.code)
        return KVD_OK;
    *err = d->failure;
    if (d->failure.code != KVD_E_LOST)
        d->failure = (struct kvd_error){0}; // the thread tries again
    pthread_cond_signal(&d->work);
    return err->code;
}

// Adds a mark with the slots' targets. Without room for it, it stays owed: a later one will stand
// for it too.
static int push_job(struct kvd_direct *d, struct kvd_error *err)
{
    d->owed = d->n_jobs == KVD_DIRECT_JOBS;
    if (d->owed)
        return KVD_OK;
    uint32_t i = (d->first_job + d->n_jobs) % KVD_DIRECT_JOBS;
    struct direct_job *job = &d->jobs[i];
    int rc = d->ops->mark(d, d->stream, i, err);
    if (rc)
        return rc;
    job->mark = i;
    for (uint32_t s = 0; s < d->options.slots; s++)
        job->targets[s] = d->slots[s].target;
    d->n_jobs++;
    pthread_cond_signal(&d->work);
    return KVD_OK;
}

static bool has_room(const struct kvd_direct *d)
{
    for (uint32_t i = 0; i < d->options.slots; i++) {
        const struct direct_slot *s = &d->slots[i];
        const struct direct_view *view = s->fresh ? &s->next : &s->now;
        if (s->sequence && s->length + d->options.step_tokens > view->stored + d->ring)
            return false;
    }
    return true;
}

// Lets the kernels see what kvd has stored by now.
static int adopt(struct kvd_direct *d, struct kvd_error *err)
{
    bool passed = d->ops->passed(d, KVD_DIRECT_ADOPTED), any = false;
    for (uint32_t i = 0; i < d->options.slots; i++) {
        struct direct_slot *s = &d->slots[i];
        if (passed)
            s->older = s->now.stored;
        if (!s->fresh)
            continue;
        kvd_direct_adopt_slot(d, i);
        any = true;
    }
    return any ? d->ops->mark(d, d->stream, KVD_DIRECT_ADOPTED, err) : KVD_OK;
}

// As hear_failure; but that kvd did not answer is no failure of a step, which waits for it.
static int await_kvd(struct kvd_direct *d, struct kvd_error *err)
{
    if (d->failure.code != KVD_E_UNAVAILABLE && d->failure.code != KVD_E_TIMEOUT)
        return hear_failure(d, err);
    hear_failure(d, err);
    return KVD_OK;
}

static int begin(struct kvd_direct *d, void *stream, struct kvd_error *err)
{
    uint32_t n = d->options.step_tokens;
    uint64_t deadline = kvd_client_deadline(d->client);
    if (d->in_step)
        return kvd_fail(err, KVD_E_PRECONDITION, "the step before has not been ended");
    for (uint32_t i = 0; i < d->options.slots; i++)
        if (d->slots[i].sequence && d->slots[i].length + n > d->options.max_tokens)
            return kvd_fail(err, KVD_E_LIMIT, "slot %u has %llu tokens, max_tokens is %u", i,
                            (unsigned long long)d->slots[i].length, d->options.max_tokens);
    if (d->failure.code == KVD_E_LOST)
        return hear_failure(d, err);
    while (!has_room(d)) {
        int rc = await_kvd(d, err);
        if (rc == KVD_OK && d->owed)
            rc = push_job(d, err);
        if (rc)
            return rc;
        if (!kvd_cond_wait(&d->progress, &d->lock, deadline) && !has_room(d))
            return kvd_fail(err, KVD_E_TIMEOUT, "kvd has not taken the tokens of earlier steps");
    }
    d->stream = stream;
    int rc = adopt(d, err);
    for (uint32_t i = 0; i < d->options.slots && rc == KVD_OK; i++) {
        struct direct_slot *s = &d->slots[i];
        s->length += s->sequence ? n : 0;
        d->length[i] = (uint32_t)s->now.stored;
        for (uint32_t p = 0; p < d->n_planes; p++)
            d->planes[p].hist_end[i] =
                (uint32_t)KVD_MAX(s->now.planes[p].hist_end, (uint64_t)d->planes[p].shape.sink);
        d->tail_tokens[i] = s->sequence ? (uint32_t)(s->length - s->now.stored) : n;
    }
    if (rc == KVD_OK)
        rc = d->ops->update(d, stream, err);
    d->in_step = rc == KVD_OK;
    return rc;
}

static kvd_result result_of(int rc, const struct kvd_error *e, kvd_failure *err)
{
    return rc ? kvd_client_fail(err, e) : KVD_SUCCESS;
}

kvd_result kvd_direct_begin(kvd_direct *d, void *stream, kvd_failure *err)
{
    KVD_WANT(err, "direct", d);
    struct kvd_error e = {0};
    if (kvd_fork_check(d->client, &e) || (d->ops->ready && d->ops->ready(d, &e)))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&d->lock);
    int rc = begin(d, stream, &e);
    pthread_mutex_unlock(&d->lock);
    return result_of(rc, &e, err);
}

static int check_layer(const struct kvd_direct *d, uint32_t layer, struct kvd_error *err)
{
    if (layer >= d->n_layers)
        return kvd_fail(err, KVD_E_INVALID, "layer %u of %u", layer, d->n_layers);
    return kvd_fork_check(d->client, err);
}

kvd_result kvd_store_enqueue(kvd_direct *d, void *stream, uint32_t layer, const void *k,
                             uint64_t k_bytes, const void *v, uint64_t v_bytes, kvd_failure *err)
{
    KVD_WANT(err, "direct", d);
    struct kvd_error e = {0};
    const struct kvd_plane *g = direct_shape(d);
    uint64_t rows = (uint64_t)d->options.slots * d->options.step_tokens;
    int rc = check_layer(d, layer, &e);
    if (rc == KVD_OK)
        rc = kvd_check_dense("k", k, k_bytes, rows, g->kv_heads, g->head_dim_k, 2, &e);
    if (rc == KVD_OK)
        rc = kvd_check_dense("v", v, v_bytes, rows, g->kv_heads, g->head_dim_v, 2, &e);
    if (rc == KVD_OK)
        rc = d->ops->store(d, stream, layer, k, v, &e);
    return result_of(rc, &e, err);
}

// What is written is to lie apart: kernels go on reading q while they write.
static int check_apart(const void *q, uint64_t q_bytes, const void *o, uint64_t o_bytes,
                       const void *lse, uint64_t lse_bytes, struct kvd_error *err)
{
    const struct kvd_overlap all[] = {
        {.begin = (uintptr_t)q, .row = q_bytes, .name = "q", .item = KVD_OVERLAP_NO_ITEM},
        {.begin = (uintptr_t)o,
         .row = o_bytes,
         .written = true,
         .name = "o",
         .item = KVD_OVERLAP_NO_ITEM},
        {.begin = (uintptr_t)lse,
         .row = lse_bytes,
         .written = true,
         .name = "lse",
         .item = KVD_OVERLAP_NO_ITEM}};
    return kvd_overlap_check(all, lse ? 3 : 2, err);
}

kvd_result kvd_attend_enqueue(kvd_direct *d, void *stream, uint32_t layer, const void *q,
                              uint64_t q_bytes, void *o, uint64_t o_bytes, float *lse,
                              uint64_t lse_bytes, kvd_failure *err)
{
    KVD_WANT(err, "direct", d);
    struct kvd_error e = {0};
    const struct kvd_plane *g = direct_shape(d);
    uint64_t rows = (uint64_t)d->options.slots * d->options.step_tokens;
    uint32_t size = d->options.dtype == KVD_F32 ? 4 : 2;
    int rc = check_layer(d, layer, &e);
    if (rc == KVD_OK)
        rc = kvd_check_dense("q", q, q_bytes, rows, g->q_heads, kvd_plane_dim_q(g), size, &e);
    if (rc == KVD_OK)
        rc = kvd_check_dense("o", o, o_bytes, rows, g->q_heads, g->head_dim_v, size, &e);
    if (rc == KVD_OK && (lse || lse_bytes))
        rc = kvd_check_dense("lse", lse, lse_bytes, rows, g->q_heads, 1, 4, &e);
    if (rc == KVD_OK)
        rc = check_apart(q, q_bytes, o, o_bytes, lse, lse_bytes, &e);
    if (rc == KVD_OK)
        rc = d->ops->attend(d, stream, layer, q, o, lse, &e);
    return result_of(rc, &e, err);
}

static int end(struct kvd_direct *d, void *stream, const uint32_t *tokens, struct kvd_error *err)
{
    uint32_t n = d->options.step_tokens;
    bool whole = d->owed;
    if (!d->in_step)
        return kvd_fail(err, KVD_E_PRECONDITION, "no step has been begun");
    for (uint32_t i = 0; tokens && i < d->options.slots; i++)
        if (d->slots[i].sequence && tokens[i] > n)
            return kvd_fail(err, KVD_E_INVALID, "slot %u keeps %u tokens of %u", i, tokens[i], n);
    d->stream = stream;
    d->in_step = false;
    for (uint32_t i = 0; i < d->options.slots; i++) {
        struct direct_slot *s = &d->slots[i];
        if (!s->sequence)
            continue;
        s->length -= tokens ? n - tokens[i] : 0;
        uint64_t chunks = s->length / KVD_CHUNK_TOKENS * KVD_CHUNK_TOKENS;
        whole |= chunks > s->target;
        s->target = KVD_MAX(s->target, chunks);
    }
    return whole ? push_job(d, err) : KVD_OK;
}

kvd_result kvd_direct_end(kvd_direct *d, void *stream, const uint32_t *tokens, kvd_failure *err)
{
    KVD_WANT(err, "direct", d);
    struct kvd_error e = {0};
    if (kvd_fork_check(d->client, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&d->lock);
    int rc = end(d, stream, tokens, &e);
    pthread_mutex_unlock(&d->lock);
    return result_of(rc, &e, err);
}

enum { ALL_SLOTS = UINT32_MAX };

static bool flushed(const struct kvd_direct *d, uint32_t only)
{
    for (uint32_t i = 0; i < d->options.slots; i++)
        if ((only == ALL_SLOTS || only == i) && d->slots[i].sequence &&
            d->slots[i].appended < d->slots[i].length)
            return false;
    return !d->busy;
}

// One wait for the thread's progress, and whether there is a reason to give up.
static int wait_for_thread(struct kvd_direct *d, uint64_t deadline, struct kvd_error *err)
{
    if (!kvd_left_ms(deadline))
        return kvd_fail(err, KVD_E_TIMEOUT, "kvd has not taken every token in time");
    kvd_cond_wait(&d->progress, &d->lock, KVD_MIN(kvd_now_ms() + 100, deadline));
    return hear_failure(d, err);
}

// Waits until the thread has taken all marks.
static int wait_for_jobs(struct kvd_direct *d, uint64_t deadline, struct kvd_error *err)
{
    int rc = hear_failure(d, err);
    while (d->n_jobs && rc == KVD_OK)
        rc = wait_for_thread(d, deadline, err);
    return rc;
}

// Brings a slot's tokens, or all slots', to kvd. The caller holds the lock.
static int flush(struct kvd_direct *d, uint32_t only, uint64_t deadline, struct kvd_error *err)
{
    if (d->in_step)
        return kvd_fail(err, KVD_E_PRECONDITION, "the step has not been ended");
    if (flushed(d, only))
        return KVD_OK;
    for (uint32_t i = 0; i < d->options.slots; i++)
        if (only == ALL_SLOTS || only == i)
            d->slots[i].target = d->slots[i].length;
    // When the new mark has passed, no kernel is under way, and none comes while we are here.
    int rc = wait_for_jobs(d, deadline, err);
    if (rc == KVD_OK)
        rc = push_job(d, err);
    if (rc == KVD_OK)
        rc = wait_for_jobs(d, deadline, err);
    d->quiet = rc == KVD_OK;
    pthread_cond_signal(&d->work);
    if (rc == KVD_OK)
        rc = hear_failure(d, err);
    while (rc == KVD_OK && !flushed(d, only))
        rc = wait_for_thread(d, deadline, err);
    d->quiet = false;
    return rc;
}

kvd_result kvd_direct_flush(kvd_direct *d, kvd_failure *err)
{
    KVD_WANT(err, "direct", d);
    struct kvd_error e = {0};
    if (kvd_fork_check(d->client, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&d->lock);
    int rc = flush(d, ALL_SLOTS, kvd_client_deadline(d->client), &e);
    pthread_mutex_unlock(&d->lock);
    return result_of(rc, &e, err);
}

kvd_result kvd_direct_length(kvd_direct *d, uint32_t slot, uint64_t *length, uint64_t *stored,
                             kvd_failure *err)
{
    KVD_WANT(err, "direct", d, "length", length);
    struct kvd_error e = {0};
    if (slot >= d->options.slots)
        kvd_fail(&e, KVD_E_INVALID, "slot %u of %u", slot, d->options.slots);
    if (e.code || kvd_fork_check(d->client, &e))
        return kvd_client_fail(err, &e);
    pthread_mutex_lock(&d->lock);
    const struct direct_slot *s = &d->slots[slot];
    *length = s->sequence ? s->length : 0;
    if (stored)
        *stored = s->sequence ? s->appended : 0;
    pthread_mutex_unlock(&d->lock);
    return KVD_SUCCESS;
}

// -- slots --------------------------------------------------------------------------------------

static int bind(struct kvd_direct *d, uint32_t slot, uint64_t sequence, struct kvd_error *err)
{
    if (slot >= d->options.slots)
        return kvd_fail(err, KVD_E_INVALID, "slot %u of %u", slot, d->options.slots);
    struct direct_slot *s = &d->slots[slot];
    uint64_t deadline = kvd_client_deadline(d->client);
    int rc = kvd_fork_check(d->client, err);
    if (rc)
        return rc;
    pthread_mutex_lock(&d->lock);
    rc = flush(d, slot, deadline, err);
    if (rc == KVD_OK) {
        *s = kvd_direct_empty(d);
        s->sequence = sequence;
    }
    pthread_mutex_unlock(&d->lock);
    if (rc || !sequence)
        return rc;
    rc = kvd_direct_map(d, &slot, 1, deadline, err);
    pthread_mutex_lock(&d->lock);
    s->length = s->older = s->appended = s->target = s->written = s->next.stored;
    if (rc)
        *s = kvd_direct_empty(d);
    else
        s->now.stored = s->next.stored; // the thread counts from there
    pthread_mutex_unlock(&d->lock);
    return rc;
}

kvd_result kvd_direct_bind(kvd_direct *d, uint32_t slot, uint64_t sequence, kvd_failure *err)
{
    KVD_WANT(err, "direct", d);
    struct kvd_error e = {0};
    int rc = bind(d, slot, sequence, &e);
    return result_of(rc, &e, err);
}

// -- opening and closing ------------------------------------------------------------------------

// Kernels of another GPU would read kvd's pages across the bus, if at all.
static int on_its_gpu(struct kvd_direct *d, struct kvd_error *err)
{
    const struct kvd_backend_ops *ops = d->backend->ops;
    const char *ours = ops->uuid ? ops->uuid(d->backend) : "";
    int rc = kvd_client_enter(d->client, kvd_client_deadline(d->client), err);
    if (rc)
        return rc;
    const char *theirs = d->client->opened->device_uuid; // "": an older kvd's, or on the CPU
    if (theirs[0] && ours[0] && strcmp(ours, theirs))
        rc = kvd_fail(err, KVD_E_PRECONDITION,
                      "the current CUDA device is %s, and kvd runs on %s: make that one current "
                      "before (cudaSetDevice), or speak to the kvd of this one",
                      ours, theirs);
    kvd_gate_leave(&d->client->gate);
    return rc;
}

static int open_backend(struct kvd_direct *d, struct kvd_error *err)
{
    if (d->client->on_cpu) {
        d->ops = &kvd_direct_cpu;
        d->backend = kvd_cpu_backend_new(0, NULL, err);
    } else {
#ifdef KVD_CUDA
        d->ops = &kvd_direct_cuda;
        d->backend = kvd_cuda_backend_current(err);
#else
        kvd_fail(err, KVD_E_UNSUPPORTED,
                 "kvd runs on a GPU, and this libkvd was built without CUDA");
#endif
    }
    return d->backend ? on_its_gpu(d, err) : err->code;
}

static int check_options(const kvd_client *c, kvd_direct_options *o, struct kvd_error *err)
{
    o->step_tokens = o->step_tokens ? o->step_tokens : 1;
    if (o->slots < 1 || o->slots > KVD_MAX_CALL_ITEMS)
        return kvd_fail(err, KVD_E_INVALID, "slots is %u; 1 to %d are possible", o->slots,
                        KVD_MAX_CALL_ITEMS);
    if (o->max_tokens < 1 || o->max_tokens > KVD_MAX_LENGTH)
        return kvd_fail(err, KVD_E_INVALID, "max_tokens is %u; 1 to %d are possible", o->max_tokens,
                        KVD_MAX_LENGTH);
    if (o->step_tokens > KVD_DIRECT_STEP)
        return kvd_fail(err, KVD_E_INVALID, "step_tokens is %u; 1 to %d are possible",
                        o->step_tokens, KVD_DIRECT_STEP);
    o->tail_tokens = o->tail_tokens ? o->tail_tokens : KVD_DIRECT_BEHIND;
    if (o->tail_tokens < KVD_DIRECT_BEHIND || o->tail_tokens > KVD_DIRECT_BEHIND_MAX)
        return kvd_fail(err, KVD_E_INVALID, "tail_tokens is %u; %d to %d are possible",
                        o->tail_tokens, KVD_DIRECT_BEHIND, KVD_DIRECT_BEHIND_MAX);
    if (o->dtype != KVD_BF16 && o->dtype != KVD_F32)
        return kvd_fail(err, KVD_E_INVALID, "dtype is %d; KVD_BF16 (0) and KVD_F32 (1) are known",
                        (int)o->dtype);
    if (c->direct)
        return kvd_fail(err, KVD_E_PRECONDITION, "this client has a kvd_direct already");
    if (c->remote)
        return kvd_fail(err, KVD_E_UNSUPPORTED, "direct mode wants kvd's unix: address");
    return KVD_OK;
}

static int take_options(struct kvd_direct *d, const kvd_client *c, const kvd_direct_options *o,
                        struct kvd_error *err)
{
    int rc = kvd_fork_check(c, err);
    if (rc == KVD_OK)
        rc = kvd_sized_take(&kvd_sized_direct_options, o, &d->options, err);
    if (rc == KVD_OK && d->options.attention)
        rc = kvd_sized_take(&kvd_sized_attention, d->options.attention, &d->attention, err);
    if (rc == KVD_OK)
        rc = kvd_check_attention(&d->attention, err);
    d->options.attention = NULL; // the caller's
    return rc ? rc : check_options(c, &d->options, err);
}

static int open_direct(struct kvd_direct *d, struct kvd_error *err)
{
    uint64_t deadline = kvd_client_deadline(d->client);
    int rc = kvd_client_enter(d->client, deadline, err);
    if (rc)
        return rc;
    d->sessions = d->client->sessions;
    rc = kvd_direct_take_layout(d, err);
    kvd_gate_leave(&d->client->gate);
    if (rc == KVD_OK)
        rc = kvd_direct_make_tables(d, err);
    if (rc == KVD_OK)
        rc = open_backend(d, err);
    if (rc == KVD_OK)
        rc = kvd_direct_map(d, NULL, 0, deadline, err);
    if (rc == KVD_OK)
        rc = kvd_direct_load_rotations(d, err);
    if (rc == KVD_OK)
        rc = d->ops->init(d, err);
    if (rc == KVD_OK && pthread_create(&d->thread, NULL, run, d))
        rc = kvd_fail(err, KVD_E_INTERNAL, "cannot start a thread");
    d->started = rc == KVD_OK;
    return rc;
}

kvd_result kvd_direct_open(kvd_client *c, const kvd_direct_options *options, kvd_direct **out,
                           kvd_failure *err)
{
    KVD_WANT(err, "client", c, "out", out);
    struct kvd_error e = {0};
    struct kvd_direct *d = calloc(1, sizeof(*d));
    if (!d) {
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
        return kvd_client_fail(err, &e);
    }
    if (take_options(d, c, options, &e)) {
        free(d);
        return kvd_client_fail(err, &e);
    }
    d->client = c;
    d->ring = (uint32_t)kvd_round_up(d->options.tail_tokens, KVD_CHUNK_TOKENS) + KVD_CHUNK_TOKENS +
              KVD_DIRECT_STEP;
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        d->planes[p].rotation_fd = -1;
    pthread_mutex_init(&d->lock, NULL);
    pthread_mutex_init(&d->socket_lock, NULL);
    kvd_cond_init(&d->work);
    kvd_cond_init(&d->progress);
    d->close_by = UINT64_MAX;
    c->direct = d;
    if (open_direct(d, &e)) {
        kvd_direct_close(&d);
        return kvd_client_fail(err, &e);
    }
    *out = d;
    return KVD_SUCCESS;
}

static void stop_thread(struct kvd_direct *d)
{
    struct kvd_error ignored;
    pthread_mutex_lock(&d->lock);
    d->close_by = kvd_client_deadline(d->client);
    for (uint32_t i = 0; i < d->options.slots && d->in_step;
         i++) // a step that was not ended is none
        d->slots[i].length -= d->slots[i].sequence ? d->options.step_tokens : 0;
    d->in_step = false;
    flush(d, ALL_SLOTS, d->close_by, &ignored);
    d->stop = true;
    pthread_cond_broadcast(&d->work);
    pthread_mutex_unlock(&d->lock);
    pthread_join(d->thread, NULL);
}

void kvd_direct_close(kvd_direct **dp)
{
    struct kvd_direct *d = dp ? KVD_TAKE(*dp) : NULL;
    if (!d)
        return;
    if (d->client->forked) { // there is no thread to stop, and others may have held the locks
        if (d->side)
            d->ops->forget(d);
        kvd_buffer_take(&d->tail, 0, true);
        return;
    }
    if (d->started)
        stop_thread(d);
    else
        d->close_by = kvd_client_deadline(d->client);
    if (d->side)
        d->ops->deinit(d);
    kvd_buffer_take(&d->tail, d->close_by, true);
    if (d->backend) {
        for (uint32_t p = 0; p < d->n_planes; p++)
            d->backend->ops->rotation_free(d->backend, &d->planes[p].rotation);
        d->backend->ops->arena_free(d->backend, &d->arena);
    }
    kvd_backend_free(&d->backend);
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        if (d->planes[p].rotation_fd >= 0)
            close(d->planes[p].rotation_fd);
    d->client->direct = NULL;
    pthread_mutex_destroy(&d->lock);
    pthread_mutex_destroy(&d->socket_lock);
    pthread_cond_destroy(&d->work);
    pthread_cond_destroy(&d->progress);
    free(d->jobs[0].targets);
    free(d->list);
    free(d->items);
    free(d->tables);
    free(d->length);
    free(d->slots);
    free(d->mapped);
    free(d->memory);
    free(d);
}

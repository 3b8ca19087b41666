// The loop writes pieces into a ring and raises `added`; the executor goes after it, and raises
// `done`. When the executor finds nothing more and nothing is under way any more, the job is over:
// the loop submits it again if there is more by then.
#include "daemon/sched/upload.h"

#include <utlist.h>

#include "daemon/core/lifecycle.h"
#include "daemon/sched/exec.h"

enum {
    BEGUN_BYTES = 4 << 20, // between looks at the clock, and of pieces that go with these at once
    BEGUN_MOST_BYTES = 16 << 20,
    BEGUN_COPIES = 64,
};
_Static_assert((int)BEGUN_COPIES >= (int)KVD_MAX_PLANES, "a piece");

struct piece {
    struct kvd_upload_copy copies[KVD_MAX_PLANES];
    uint32_t n;
};

// What is begun at once.
struct begun {
    struct kvd_copy copies[BEGUN_COPIES];
    struct kvd_upload_copy in[BEGUN_COPIES]; // what each began with
    uint32_t n;
    uint64_t bytes;
};

struct kvd_upload {
    struct kvd_job job; // first
    struct kvd_daemon *d;
    kvd_upload_moved *moved;
    void *ctx;
    bool runs;
    uint32_t told;                  // of those that are done
    struct kvd_upload *prev, *next; // those that run
    // The executor's while it runs.
    uint32_t begun;
    uint64_t since_ns;
    uint32_t ends[KVD_COPIES_AT_ONCE]; // of what is under way: `done` after it
    // Both's. They count all pieces from the beginning.
    _Atomic uint32_t added, done;
    _Atomic uint64_t ran_ns, copies;
    struct piece pieces[KVD_UPLOAD_MOST];
};

struct kvd_uploads {
    uv_async_t async; // something is done
    struct kvd_upload *running;
};

// -- executor -----------------------------------------------------------------------------------

// Whether one can be made at once with those of a run, as its last or as its first; then it is one
// of them.
static bool joins(struct kvd_copy *run, const struct kvd_upload_copy *in,
                  const struct kvd_upload_copy *c)
{
    if (!c->from_in || c->from_in != in->from_in || c->to_in != in->to_in || c->bytes != run->bytes)
        return false;
    if (run->pieces == 1) {
        run->to_stride = c->to > run->to ? c->to - run->to : run->to - c->to;
        run->from_stride = c->from > run->from ? c->from - run->from : run->from - c->from;
    }
    if (KVD_MIN(run->to_stride, run->from_stride) < run->bytes ||
        KVD_MAX(run->to_stride, run->from_stride) > KVD_COPY_STRIDE_MOST)
        return false;
    if (c->to == run->to + run->pieces * run->to_stride &&
        c->from == run->from + run->pieces * run->from_stride) {
        run->pieces++;
        return true;
    }
    if (c->to != run->to - run->to_stride || c->from != run->from - run->from_stride)
        return false;
    run->to = c->to;
    run->from = c->from;
    run->pieces++;
    return true;
}

// Of a run for each plane one is the last.
static bool joins_some(struct begun *b, const struct kvd_upload_copy *c)
{
    for (uint32_t i = b->n; i-- > 0 && b->n - i <= KVD_MAX_PLANES;)
        if (joins(&b->copies[i], &b->in[i], c))
            return true;
    return false;
}

// Takes in the next piece. False: it is for the next time.
static bool take_in(struct begun *b, const struct piece *p)
{
    bool enough = b->bytes >= BEGUN_BYTES;
    if (b->n + p->n > BEGUN_COPIES || b->bytes >= BEGUN_MOST_BYTES)
        return false;
    for (uint32_t i = 0; i < p->n; i++) {
        const struct kvd_upload_copy *c = &p->copies[i];
        if (!joins_some(b, c)) {
            if (enough && i == 0)
                return false;
            b->in[b->n] = *c;
            b->copies[b->n++] =
                (struct kvd_copy){.to = c->to, .from = c->from, .bytes = c->bytes, .pieces = 1};
        }
        b->bytes += c->bytes;
    }
    return true;
}

// Begins the next copies. False: there are none.
static bool begin_some(struct kvd_upload *u, uint32_t which)
{
    const struct kvd_backend_ops *ops = u->d->backend->ops;
    struct kvd_error err = {0};
    struct begun b = {.n = 0};
    uint32_t added = atomic_load_explicit(&u->added, memory_order_acquire);
    if (u->begun == added)
        return false;
    while (u->begun != added && take_in(&b, &u->pieces[u->begun % KVD_UPLOAD_MOST]))
        u->begun++;
    u->ends[which] = u->begun;
    atomic_fetch_add(&u->copies, b.n);
    u->job.rc = ops->copy_begin(u->d->backend, b.copies, b.n, which, &err);
    return true;
}

static void end_some(struct kvd_upload *u, uint32_t which)
{
    struct kvd_error err = {0};
    int rc = u->d->backend->ops->copy_end(u->d->backend, which, &err);
    uint64_t now = uv_hrtime();
    atomic_fetch_add(&u->ran_ns, now - u->since_ns);
    u->since_ns = now;
    u->job.rc = u->job.rc ? u->job.rc : rc;
    if (u->job.rc)
        return;
    atomic_store_explicit(&u->done, u->ends[which], memory_order_release);
    uv_async_send(&u->d->uploads->async);
}

static bool run(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_upload *u = (struct kvd_upload *)job;
    uint32_t first = 0, n = 0; // that are under way
    (void)d;
    u->since_ns = uv_hrtime();
    for (;;) {
        bool stops = job->rc || kvd_slice_over(&job->slice);
        if (!stops && n < KVD_COPIES_AT_ONCE && begin_some(u, (first + n) % KVD_COPIES_AT_ONCE)) {
            n++;
        } else if (n) {
            end_some(u, first);
            first = (first + 1) % KVD_COPIES_AT_ONCE;
            n--;
        } else {
            break;
        }
    }
    return !job->rc && !atomic_load(&job->cancelled) && u->begun != atomic_load(&u->added);
}

// -- loop ---------------------------------------------------------------------------------------

static void ended(struct kvd_daemon *d, struct kvd_job *job);

static void submit(struct kvd_upload *u)
{
    struct kvd_fair_job fair = {.tenant = u->job.fair.tenant, .flow = u->job.fair.flow};
    u->job = (struct kvd_job){.fair = fair, .run = run, .done = ended};
    kvd_daemon_work_begin(u->d);
    kvd_exec_submit(u->d, &u->job);
}

static void ended(struct kvd_daemon *d, struct kvd_job *job)
{
    struct kvd_upload *u = (struct kvd_upload *)job;
    bool gives_up = job->rc || job->abandoned || atomic_load(&job->cancelled);
    u->told = u->done;
    if (!gives_up && u->added != u->done) {
        submit(u);
        u->moved(u->ctx, false, KVD_OK);
    } else {
        int rc = job->rc;
        u->runs = false;
        DL_DELETE(d->uploads->running, u);
        u->moved(u->ctx, true, rc); // which may free it
        if (rc)
            kvd_daemon_check_device(d);
    }
    kvd_daemon_work_end(d);
}

static void on_async(uv_async_t *async)
{
    struct kvd_daemon *d = async->data;
    struct kvd_upload *u;
    DL_FOREACH(d->uploads->running, u)
    {
        uint32_t done = atomic_load_explicit(&u->done, memory_order_acquire);
        if (done == u->told)
            continue;
        u->told = done;
        u->moved(u->ctx, false, KVD_OK); // one that runs is not freed by that
    }
}

struct kvd_upload *kvd_upload_new(struct kvd_daemon *d, uint32_t ns, struct kvd_fair_flow *flow,
                                  kvd_upload_moved *moved, void *ctx)
{
    struct kvd_upload *u = calloc(1, sizeof(*u));
    if (!u)
        return NULL;
    u->d = d;
    u->moved = moved;
    u->ctx = ctx;
    u->job.fair.tenant = ns;
    u->job.fair.flow = flow;
    return u;
}

void kvd_upload_free(struct kvd_upload **u)
{
    free(KVD_TAKE(*u));
}

bool kvd_upload_has_room(const struct kvd_upload *u)
{
    return u->added - atomic_load_explicit(&u->done, memory_order_acquire) < KVD_UPLOAD_MOST;
}

void kvd_upload_add(struct kvd_upload *u, const struct kvd_upload_copy *copies, uint32_t n)
{
    uint32_t added = u->added;
    struct piece *p = &u->pieces[added % KVD_UPLOAD_MOST];
    if (n > 0)
        memcpy(p->copies, copies, n * sizeof(*copies));
    p->n = n;
    atomic_store_explicit(&u->added, added + 1, memory_order_release);
    if (u->runs)
        return;
    u->runs = true;
    DL_APPEND(u->d->uploads->running, u);
    submit(u);
}

uint32_t kvd_upload_done(const struct kvd_upload *u)
{
    return atomic_load_explicit(&u->done, memory_order_acquire);
}

bool kvd_upload_runs(const struct kvd_upload *u)
{
    return u->runs;
}

void kvd_upload_cancel(struct kvd_upload *u)
{
    if (u->runs)
        kvd_exec_cancel(&u->job);
}

uint64_t kvd_upload_ran_ns(const struct kvd_upload *u)
{
    return atomic_load(&u->ran_ns);
}

uint64_t kvd_upload_copies(const struct kvd_upload *u)
{
    return atomic_load(&u->copies);
}

// -- the part -----------------------------------------------------------------------------------

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    d->uploads = calloc(1, sizeof(*d->uploads));
    if (!d->uploads)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_async_init(&d->loop, &d->uploads->async, on_async);
    d->uploads->async.data = d;
    return KVD_OK;
}

// No job is left by then.
static void end(struct kvd_daemon *d)
{
    if (d->uploads)
        uv_close((uv_handle_t *)&d->uploads->async, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->uploads));
}

const struct kvd_part kvd_part_uploads = {.start = start, .end = end, .deinit = deinit};

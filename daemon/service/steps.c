#include "daemon/service/steps.h"

#include <uthash.h>

enum { PIECE_NS = 1000000 }; // then others have their turn

// Of a session, as long as it has calls in line.
struct kvd_steps_flow {
    uint64_t session;
    uint32_t calls;
    struct kvd_fair_flow fair;
    UT_hash_handle hh;
};

struct kvd_steps {
    uv_idle_t idle; // runs while there is something to do
    struct kvd_fair fair;
    struct kvd_steps_flow *flows;
    const struct kvd_stepped *running; // NULL: none, or it has taken itself out
    uint64_t begun_ns;                 // its step
};

static struct kvd_stepped *next_of(struct kvd_steps *steps)
{
    struct kvd_fair_job *job = kvd_fair_next(&steps->fair);
    return job ? (struct kvd_stepped *)((uint8_t *)job - offsetof(struct kvd_stepped, job)) : NULL;
}

static void work(struct kvd_steps *steps)
{
    struct kvd_daemon *d = steps->idle.data;
    uint64_t begin = uv_hrtime(), now = begin;
    struct kvd_stepped *s;
    while (now - begin < PIECE_NS && (s = next_of(steps))) {
        steps->running = s;
        steps->begun_ns = now;
        s->step(d, s);
        now = uv_hrtime();
        if (steps->running)
            kvd_fair_charge(&steps->fair, &s->job, now - steps->begun_ns);
        steps->running = NULL;
    }
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_steps *steps = ((struct kvd_daemon *)idle->data)->steps;
    work(steps);
    if (!next_of(steps))
        uv_idle_stop(idle);
}

// NULL when memory is short.
static struct kvd_steps_flow *flow_of(struct kvd_steps *steps, uint64_t session)
{
    struct kvd_steps_flow *flow;
    HASH_FIND(hh, steps->flows, &session, sizeof(session), flow);
    if (!flow && (flow = calloc(1, sizeof(*flow)))) {
        flow->session = session;
        HASH_ADD(hh, steps->flows, session, sizeof(flow->session), flow);
    }
    if (flow)
        flow->calls++;
    return flow;
}

void kvd_steps_add(struct kvd_daemon *d, struct kvd_stepped *s)
{
    struct kvd_steps *steps = d->steps;
    s->flow = flow_of(steps, s->session);
    s->alone = (struct kvd_fair_flow){0};
    s->job = (struct kvd_fair_job){.tenant = s->ns, .flow = s->flow ? &s->flow->fair : &s->alone};
    kvd_fair_push(&steps->fair, &s->job);
    uv_idle_start(&steps->idle, on_idle);
}

void kvd_steps_begin(struct kvd_daemon *d, struct kvd_stepped *s, uint32_t ns, uint64_t session)
{
    bool alone = !next_of(d->steps);
    s->ns = ns;
    s->session = session;
    kvd_steps_add(d, s);
    if (alone)
        work(d->steps);
}

void kvd_steps_drop(struct kvd_daemon *d, struct kvd_stepped *s)
{
    struct kvd_steps *steps = d->steps;
    struct kvd_steps_flow *flow = KVD_TAKE(s->flow);
    if (steps->running == s) {
        kvd_fair_charge(&steps->fair, &s->job, uv_hrtime() - steps->begun_ns);
        steps->running = NULL;
    }
    kvd_fair_remove(&steps->fair, &s->job);
    if (!flow || --flow->calls)
        return;
    HASH_DEL(steps->flows, flow);
    free(flow);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    struct kvd_steps *steps = calloc(1, sizeof(*steps));
    if (!steps || !kvd_fair_init(&steps->fair, KVD_MAX_NAMESPACES)) {
        free(steps);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    d->steps = steps;
    uv_idle_init(&d->loop, &steps->idle);
    steps->idle.data = d;
    return KVD_OK;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    kvd_fair_deinit(&d->steps->fair);
    free(KVD_TAKE(d->steps));
}

// No call is left by then.
static void end(struct kvd_daemon *d)
{
    if (d->steps)
        uv_close((uv_handle_t *)&d->steps->idle, on_closed);
}

const struct kvd_part kvd_part_steps = {.init = init, .end = end};

#include "daemon/service/steps.h"

#include <utlist.h>

enum { PIECE_NS = 1000000 }; // then others have their turn

struct kvd_steps {
    uv_idle_t idle; // runs while there is something to do
    struct kvd_stepped *all;
};

static void work(struct kvd_steps *steps)
{
    struct kvd_daemon *d = steps->idle.data;
    uint64_t begin = uv_hrtime();
    do {
        struct kvd_stepped *s = steps->all;
        DL_DELETE(steps->all, s); // behind the others
        DL_APPEND(steps->all, s);
        s->step(d, s);
    } while (steps->all && uv_hrtime() - begin < PIECE_NS);
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_steps *steps = ((struct kvd_daemon *)idle->data)->steps;
    if (steps->all)
        work(steps);
    if (!steps->all)
        uv_idle_stop(idle);
}

void kvd_steps_begin(struct kvd_daemon *d, struct kvd_stepped *s)
{
    struct kvd_steps *steps = d->steps;
    bool alone = !steps->all;
    DL_APPEND(steps->all, s);
    if (alone)
        work(steps);
    if (steps->all)
        uv_idle_start(&steps->idle, on_idle);
}

void kvd_steps_add(struct kvd_daemon *d, struct kvd_stepped *s)
{
    DL_APPEND(d->steps->all, s);
    uv_idle_start(&d->steps->idle, on_idle);
}

void kvd_steps_drop(struct kvd_daemon *d, struct kvd_stepped *s)
{
    DL_DELETE(d->steps->all, s);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->steps = calloc(1, sizeof(*d->steps));
    if (!d->steps)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->steps->idle);
    d->steps->idle.data = d;
    return KVD_OK;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(KVD_TAKE(d->steps));
}

// No call is left by then.
static void end(struct kvd_daemon *d)
{
    if (d->steps)
        uv_close((uv_handle_t *)&d->steps->idle, on_closed);
}

const struct kvd_part kvd_part_steps = {.init = init, .end = end};

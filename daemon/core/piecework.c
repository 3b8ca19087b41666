#include "daemon/core/piecework.h"

#include <utlist.h>
#include <uv.h>

#include "daemon/core/lifecycle.h"

enum {
    PIECE_NS = 1000000, // then others have their turn
    STEPS = 32,         // between looks at the clock
};

struct kvd_pieceworks {
    uv_idle_t idle; // runs while there are some
    struct kvd_piecework *all;
};

static void take_out(struct kvd_daemon *d, struct kvd_piecework *r)
{
    DL_DELETE2(d->pieceworks->all, r, before, after);
}

// Works for a millisecond. True: the first one is done.
static bool go_on(struct kvd_daemon *d)
{
    struct kvd_piecework *r = d->pieceworks->all;
    uint64_t begin = uv_hrtime();
    for (uint32_t i = 1; r->next(d, r); i++)
        if (i % STEPS == 0 && uv_hrtime() - begin >= PIECE_NS)
            return false;
    take_out(d, r);
    r->done(d, r);
    return true;
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    if (d->pieceworks->all)
        go_on(d);
    if (d->pieceworks->all)
        return;
    uv_idle_stop(idle);
    kvd_daemon_go_on(d);
}

void kvd_piecework_begin(struct kvd_daemon *d, struct kvd_piecework *r)
{
    bool first = !d->pieceworks->all;
    DL_APPEND2(d->pieceworks->all, r, before, after);
    if (!first || !go_on(d))
        uv_idle_start(&d->pieceworks->idle, on_idle);
}

void kvd_piecework_finish(struct kvd_daemon *d, struct kvd_piecework *r)
{
    bool last = false;
    while (!last) {
        last = d->pieceworks->all == r;
        while (!go_on(d))
            continue;
    }
}

void kvd_piecework_drop(struct kvd_daemon *d, struct kvd_piecework *r)
{
    take_out(d, r);
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->pieceworks = calloc(1, sizeof(*d->pieceworks));
    if (!d->pieceworks)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->pieceworks->idle);
    d->pieceworks->idle.data = d;
    return KVD_OK;
}

static bool busy(const struct kvd_daemon *d)
{
    return d->pieceworks->all;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(KVD_TAKE(d->pieceworks));
}

static void end(struct kvd_daemon *d)
{
    if (!d->pieceworks)
        return;
    while (d->pieceworks->all)
        go_on(d);
    uv_close((uv_handle_t *)&d->pieceworks->idle, on_closed);
}

const struct kvd_part kvd_part_piecework = {.init = init, .busy = busy, .end = end};

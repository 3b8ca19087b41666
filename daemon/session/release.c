#include "daemon/session/release.h"

#include <utlist.h>
#include <uv.h>

#include "daemon/core/lifecycle.h"
#include "daemon/session/ledger.h"
#include "daemon/session/session.h"

enum {
    PIECE_NS = 1000000, // then others have their turn
    SEQUENCES = 32,     // between looks at the clock
};

struct kvd_releases {
    uv_idle_t idle; // runs while there are some
    struct kvd_release *all;
};

// Of a session that has ended.
struct held_release {
    struct kvd_release release;
    struct kvd_held *held;
};

static void take_out(struct kvd_daemon *d, struct kvd_release *r)
{
    DL_DELETE2(d->releases->all, r, before, after);
}

// Works for a millisecond. True: the first one is done.
static bool go_on(struct kvd_daemon *d)
{
    struct kvd_release *r = d->releases->all;
    uint64_t begin = uv_hrtime();
    for (uint32_t i = 1; r->next(d, r); i++)
        if (i % SEQUENCES == 0 && uv_hrtime() - begin >= PIECE_NS)
            return false;
    take_out(d, r);
    r->done(d, r);
    return true;
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    if (d->releases->all)
        go_on(d);
    if (d->releases->all)
        return;
    uv_idle_stop(idle);
    kvd_daemon_go_on(d);
}

void kvd_release_begin(struct kvd_daemon *d, struct kvd_release *r)
{
    bool first = !d->releases->all;
    DL_APPEND2(d->releases->all, r, before, after);
    if (!first || !go_on(d))
        uv_idle_start(&d->releases->idle, on_idle);
}

void kvd_release_finish(struct kvd_daemon *d, struct kvd_release *r)
{
    bool last = false;
    while (!last) {
        last = d->releases->all == r;
        while (!go_on(d))
            continue;
    }
}

void kvd_release_drop(struct kvd_daemon *d, struct kvd_release *r)
{
    take_out(d, r);
}

static bool next_held(struct kvd_daemon *d, struct kvd_release *r)
{
    struct held_release *h = (struct held_release *)r;
    struct kvd_held *one = h->held;
    if (!one)
        return false;
    kvd_ledger_forget(d->ledger, one->record);
    kvd_pool_seq_release(d->pool, one->seq);
    HASH_DEL(h->held, one);
    free(one);
    return true;
}

static void held_done(struct kvd_daemon *d, struct kvd_release *r)
{
    (void)d;
    free(r);
}

void kvd_release_held(struct kvd_daemon *d, struct kvd_held *held)
{
    struct held_release now = {.held = held}, *later = malloc(sizeof(*later));
    if (!later) {
        while (next_held(d, &now.release))
            continue;
        return;
    }
    *later = (struct held_release){.release = {.next = next_held, .done = held_done}, .held = held};
    kvd_release_begin(d, &later->release);
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->releases = calloc(1, sizeof(*d->releases));
    if (!d->releases)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->releases->idle);
    d->releases->idle.data = d;
    return KVD_OK;
}

static bool busy(const struct kvd_daemon *d)
{
    return d->releases->all;
}

static void on_closed(uv_handle_t *handle)
{
    struct kvd_daemon *d = handle->data;
    free(KVD_TAKE(d->releases));
}

static void end(struct kvd_daemon *d)
{
    if (!d->releases)
        return;
    while (d->releases->all)
        go_on(d);
    uv_close((uv_handle_t *)&d->releases->idle, on_closed);
}

const struct kvd_part kvd_part_release = {.init = init, .busy = busy, .end = end};

#include "daemon/session/room.h"

#include <utlist.h>
#include <uv.h>

enum {
    PIECE_NS = 500000, // then others have their turn
    BLOCKS = 1024,     // that are looked at between looks at the clock
    TAKEN_UP_MS = 1,   // between looks whether what kvd itself has been given back
};

struct kvd_rooms {
    uv_idle_t idle;   // runs while somebody waits, or something is begun
    uv_timer_t timer; // and in its place while nobody waits for anything but what kvd itself has
    struct kvd_room *waiting;
    uint64_t waits, longest_ns; // waits: that began; longest_ns: piece
};

static void on_timer(uv_timer_t *timer);

// Whether there is one that waits for nothing but what kvd itself has (`so`), or one that waits for
// something else.
static bool any(const struct kvd_rooms *all, bool so)
{
    const struct kvd_room *r = all->waiting;
    while (r && r->at.taken_up != so)
        r = r->next;
    return r;
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    struct kvd_rooms *all = d->rooms;
    uint64_t begin = uv_hrtime(), took;
    struct kvd_room *last = all->waiting ? all->waiting->prev : NULL, *r = NULL;
    bool in_time = true, more;
    while ((more = kvd_pool_vacate_step(d->pool, BLOCKS)) && in_time)
        in_time = uv_hrtime() - begin < PIECE_NS;
    // Each once, in order: who has to wait still is behind them then.
    while (in_time && r != last && all->waiting) {
        r = all->waiting;
        kvd_room_forget(d, r);
        r->again(d, r);
        in_time = uv_hrtime() - begin < PIECE_NS;
    }
    took = uv_hrtime() - begin;
    all->longest_ns = KVD_MAX(all->longest_ns, took);
    if (more || any(all, false)) // it is taken to its end though nobody waits any more
        return;
    uv_idle_stop(idle);
    if (all->waiting)
        uv_timer_start(&all->timer, on_timer, TAKEN_UP_MS, 0);
}

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    uv_idle_start(&d->rooms->idle, on_idle);
}

bool kvd_room_make(struct kvd_daemon *d, struct kvd_room *room, uint32_t ns, uint32_t layout,
                   const struct kvd_pool_need *need)
{
    struct kvd_rooms *all = d->rooms;
    bool begins = !room->at.most;
    if (kvd_pool_room_make(d->pool, ns, layout, need, &room->at)) {
        room->at = (struct kvd_pool_room){0};
        return true;
    }
    all->waits += begins;
    room->waits = true;
    DL_APPEND(all->waiting, room);
    uv_idle_start(&all->idle, on_idle);
    return false;
}

void kvd_room_forget(struct kvd_daemon *d, struct kvd_room *room)
{
    if (!room->waits)
        return;
    room->waits = false;
    DL_DELETE(d->rooms->waiting, room);
}

bool kvd_room_wanted_back(const struct kvd_daemon *d)
{
    return any(d->rooms, true);
}

// -- the part -----------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->rooms = calloc(1, sizeof(*d->rooms));
    if (!d->rooms)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->rooms->idle);
    uv_timer_init(&d->loop, &d->rooms->timer);
    d->rooms->idle.data = d->rooms->timer.data = d;
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    if (!d->rooms)
        return;
    uv_close((uv_handle_t *)&d->rooms->idle, NULL);
    uv_close((uv_handle_t *)&d->rooms->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->rooms));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_room_waits_total", "counter",
               "Times that a call waited, as an extent had to be emptied for it or kvd itself had "
               "blocks for a while that were in its way.",
               (double)d->rooms->waits);
    kvd_metric(f, "kvd_room_longest_piece_seconds", "gauge",
               "The longest time that emptying extents has kept the loop at once.",
               (double)d->rooms->longest_ns / 1e9);
}

const struct kvd_part kvd_part_room = {
    .init = init, .end = end, .deinit = deinit, .metrics = metrics};

// What nobody waits for any more, done after what somebody waits for.
#include <utlist.h>

#include "daemon/rpc/links.h"
#include "daemon/rpc/rpc_internal.h"

enum { LATER = 8 }; // tags in a round of the loop: 0.2 ms

// Fires so many of them.
static void fire_later(struct kvd_rpc *r, uint32_t most)
{
    struct kvd_tag *tag;
    for (uint32_t i = 0; (tag = r->later) && i < most; i++) {
        DL_DELETE2(r->later, tag, previous, next);
        tag->fire(tag, true);
    }
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    fire_later(d->rpc, LATER);
    if (!d->rpc->later)
        uv_idle_stop(idle);
    if (d->links)
        kvd_links_turn(d);
}

void kvd_tag_later(struct kvd_daemon *d, struct kvd_tag *tag, void (*fire)(struct kvd_tag *, bool))
{
    tag->fire = fire;
    DL_APPEND2(d->rpc->later, tag, previous, next);
    uv_idle_start(&d->rpc->idle, on_idle);
}

void kvd_later_init(struct kvd_daemon *d)
{
    uv_idle_init(&d->loop, &d->rpc->idle);
    d->rpc->idle.data = d;
}

void kvd_later_all(struct kvd_daemon *d)
{
    fire_later(d->rpc, UINT32_MAX);
}

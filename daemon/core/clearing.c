// Clearing what is idle in the pool, in pieces.
#include "daemon/core/piecework.h"

static bool next(struct kvd_daemon *d, struct kvd_piecework *w)
{
    return !kvd_pool_clear(d->pool, &((struct kvd_clearing *)w)->at, 1);
}

void kvd_clearing_begin(struct kvd_daemon *d, struct kvd_clearing *c,
                        void (*done)(struct kvd_daemon *d, struct kvd_piecework *w))
{
    c->times++;
    c->work = (struct kvd_piecework){.next = next, .done = done};
    kvd_piecework_begin(d, &c->work);
}

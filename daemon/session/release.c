#include "daemon/session/release.h"

#include "daemon/core/piecework.h"
#include "daemon/session/ledger.h"
#include "daemon/session/session.h"

// Of a session that has ended.
struct held_release {
    struct kvd_piecework work;
    struct kvd_held *held;
};

static bool next_held(struct kvd_daemon *d, struct kvd_piecework *r)
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

static void held_done(struct kvd_daemon *d, struct kvd_piecework *r)
{
    (void)d;
    free(r);
}

void kvd_release_held(struct kvd_daemon *d, struct kvd_held *held)
{
    struct held_release now = {.held = held}, *later = malloc(sizeof(*later));
    if (!later) {
        while (next_held(d, &now.work))
            continue;
        return;
    }
    *later = (struct held_release){.work = {.next = next_held, .done = held_done}, .held = held};
    kvd_piecework_begin(d, &later->work);
}

#include "daemon/service/waits.h"

#include <uthash.h>

#include "daemon/sched/fair.h"

#define MOST_BYTES (256ull << 20)

// Of a session, as long as it has some.
struct kvd_wait_session {
    uint64_t session;
    uint32_t ns;
    struct kvd_waiting waiting;
    UT_hash_handle hh;
};

struct kvd_waits {
    struct kvd_wait_session *sessions;
    struct kvd_waiting all, of_namespace[KVD_MAX_NAMESPACES];
    uint64_t refused;
};

static void count(struct kvd_waiting *w, bool on, uint64_t bytes)
{
    w->calls += on ? 1 : -1u;
    w->bytes += on ? bytes : -bytes;
}

static void count_all(struct kvd_waits *all, const struct kvd_wait *w, bool on)
{
    count(&all->all, on, w->bytes);
    count(&all->of_namespace[w->of->ns], on, w->bytes);
    count(&w->of->waiting, on, w->bytes);
}

// A namespace ends up with at most three quarters of all, and shares those among its sessions.
static bool fits(const struct kvd_waits *all, const struct kvd_wait_session *of, uint32_t ns,
                 uint64_t bytes)
{
    const struct kvd_waiting most = {INT32_MAX / 4, MOST_BYTES}; // calls are bounded as such
    const struct kvd_waiting part = {most.calls, MOST_BYTES / 4 * 3}, none = {0};
    const char *why;
    return kvd_waiting_fits(all->of_namespace[ns], all->all, most, bytes, &why) &&
           kvd_waiting_fits(of ? of->waiting : none, all->of_namespace[ns], part, bytes, &why);
}

bool kvd_wait_begin(struct kvd_daemon *d, struct kvd_wait *w, uint32_t ns, uint64_t session,
                    uint64_t bytes)
{
    struct kvd_waits *all = d->waits;
    struct kvd_wait_session *of;
    if (w->of)
        return true;
    HASH_FIND(hh, all->sessions, &session, sizeof(session), of);
    bool room = fits(all, of, ns, bytes);
    if (room && !of && (of = calloc(1, sizeof(*of)))) {
        of->session = session;
        of->ns = ns;
        HASH_ADD(hh, all->sessions, session, sizeof(of->session), of);
    }
    if (!room || !of) {
        all->refused++;
        return false;
    }
    *w = (struct kvd_wait){.bytes = bytes, .of = of};
    count_all(all, w, true);
    return true;
}

void kvd_wait_end(struct kvd_daemon *d, struct kvd_wait *w)
{
    struct kvd_waits *all = d->waits;
    struct kvd_wait_session *of = w->of;
    if (!of)
        return;
    count_all(all, w, false);
    w->of = NULL;
    if (of->waiting.calls)
        return;
    HASH_DEL(all->sessions, of);
    free(of);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->waits = calloc(1, sizeof(*d->waits));
    return d->waits ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

// No call is left by then.
static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->waits));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_lookups_waiting", "gauge",
               "Lookups that wait for a tier or for what another session computes.",
               d->waits->all.calls);
    kvd_metric(f, "kvd_lookups_not_waiting_total", "counter",
               "Lookups that were answered with what was known, as those that wait had too much "
               "memory for one more.",
               (double)d->waits->refused);
}

const struct kvd_part kvd_part_waits = {.init = init, .deinit = deinit, .metrics = metrics};

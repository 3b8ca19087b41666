#include "daemon/sched/fair.h"

#include <stdlib.h>
#include <utlist.h>

enum { SHARE = 3 }; // times what is left to others

bool kvd_fair_init(struct kvd_fair *f, uint32_t tenants)
{
    *f = (struct kvd_fair){.tenants = calloc(tenants, sizeof(*f->tenants))};
    return f->tenants;
}

void kvd_fair_deinit(struct kvd_fair *f)
{
    free(f->tenants);
    *f = (struct kvd_fair){0};
}

void kvd_fair_push(struct kvd_fair *f, struct kvd_fair_job *job)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    if (!t->jobs) {
        uint64_t now = f->active ? f->now : f->latest;
        t->used = t->used > now ? t->used : now;
        DL_APPEND(f->active, t);
    }
    DL_APPEND(t->jobs, job);
}

struct kvd_fair_job *kvd_fair_next(struct kvd_fair *f)
{
    struct kvd_fair_tenant *least = f->active, *t;
    DL_FOREACH(f->active, t)
    if (t->used < least->used)
        least = t;
    if (!least)
        return NULL;
    f->now = least->used;
    return least->jobs;
}

void kvd_fair_charge(struct kvd_fair *f, const struct kvd_fair_job *job, uint64_t cost)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    t->used += cost;
    f->latest = t->used > f->latest ? t->used : f->latest;
    DL_DELETE(f->active, t);
    DL_APPEND(f->active, t);
}

void kvd_fair_advance(struct kvd_fair *f, const struct kvd_fair_job *job, uint64_t cost)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    t->used += cost;
    f->latest = t->used > f->latest ? t->used : f->latest;
    if (f->active == t && !t->next)
        f->now = t->used;
}

void kvd_fair_remove(struct kvd_fair *f, struct kvd_fair_job *job)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    DL_DELETE(t->jobs, job);
    if (!t->jobs)
        DL_DELETE(f->active, t);
}

bool kvd_fair_contended(const struct kvd_fair *f, const struct kvd_fair_job *job)
{
    const struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    return f->active && (f->active != t || f->active->next);
}

bool kvd_waiting_fits(struct kvd_waiting own, struct kvd_waiting all, struct kvd_waiting most,
                      uint64_t n, const char **why)
{
    uint64_t calls = most.calls - (all.calls < most.calls ? all.calls : most.calls);
    uint64_t bytes = most.bytes - (all.bytes < most.bytes ? all.bytes : most.bytes);
    // The last place is for one who has none.
    bool room = own.calls == 0 ? calls > 0 : calls > 0 && own.calls < SHARE * (calls - 1);
    *why = room ? "bytes" : "calls";
    return room && n <= bytes && own.bytes + n <= SHARE * (bytes - n);
}

#include "daemon/sched/fair.h"

#include <stdlib.h>
#include <utlist.h>

enum { SHARE = 3 }; // times what is left to others

static void enter(struct kvd_fair_level *l, struct kvd_fair_share *s)
{
    uint64_t now = l->active ? l->now : l->latest;
    s->used = s->used > now ? s->used : now;
    DL_APPEND(l->active, s);
}

static struct kvd_fair_share *least(struct kvd_fair_level *l)
{
    struct kvd_fair_share *first = l->active, *s;
    DL_FOREACH(l->active, s)
    if (s->used < first->used)
        first = s;
    if (first)
        l->now = first->used;
    return first;
}

static void charge(struct kvd_fair_level *l, struct kvd_fair_share *s, uint64_t cost)
{
    s->used += cost;
    l->latest = s->used > l->latest ? s->used : l->latest;
    DL_DELETE(l->active, s);
    DL_APPEND(l->active, s);
}

static void advance(struct kvd_fair_level *l, struct kvd_fair_share *s, uint64_t cost)
{
    s->used += cost;
    l->latest = s->used > l->latest ? s->used : l->latest;
    if (l->active == s && !s->next)
        l->now = s->used;
}

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
    if (!t->flows.active)
        enter(&f->level, &t->share);
    if (!job->flow->jobs)
        enter(&t->flows, &job->flow->share);
    DL_APPEND(job->flow->jobs, job);
}

struct kvd_fair_job *kvd_fair_next(struct kvd_fair *f)
{
    struct kvd_fair_tenant *t = (struct kvd_fair_tenant *)least(&f->level);
    return t ? ((struct kvd_fair_flow *)least(&t->flows))->jobs : NULL;
}

void kvd_fair_charge(struct kvd_fair *f, const struct kvd_fair_job *job, uint64_t cost)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    charge(&f->level, &t->share, cost);
    charge(&t->flows, &job->flow->share, cost);
}

void kvd_fair_advance(struct kvd_fair *f, const struct kvd_fair_job *job, uint64_t cost)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    advance(&f->level, &t->share, cost);
    advance(&t->flows, &job->flow->share, cost);
}

bool kvd_fair_precedes(const struct kvd_fair *f, const struct kvd_fair_job *a,
                       const struct kvd_fair_job *b)
{
    return a->tenant != b->tenant
               ? f->tenants[a->tenant].share.used < f->tenants[b->tenant].share.used
               : a->flow->share.used < b->flow->share.used;
}

void kvd_fair_remove(struct kvd_fair *f, struct kvd_fair_job *job)
{
    struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    DL_DELETE(job->flow->jobs, job);
    if (!job->flow->jobs)
        DL_DELETE(t->flows.active, &job->flow->share);
    if (!t->flows.active)
        DL_DELETE(f->level.active, &t->share);
}

bool kvd_fair_contended(const struct kvd_fair *f, const struct kvd_fair_job *job)
{
    const struct kvd_fair_tenant *t = &f->tenants[job->tenant];
    const struct kvd_fair_share *flows = t->flows.active;
    return f->level.active && (f->level.active != &t->share || t->share.next ||
                               flows != &job->flow->share || flows->next);
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

// Tiers for operators: what they have, and dropping it.
#include "admin.pb-c.h"
#include "daemon/service/events.h"
#include "daemon/service/handlers.h"
#include "daemon/tier/tiers.h"
#include "kvd.pb-c.h"

static void fill_tier(const struct kvd_tier_status *s, Kvd__V1__TierInfo *out)
{
    const uint64_t *got = s->count[KVD_TIER_GET];
    kvd__v1__tier_info__init(out);
    out->name = (char *)s->name;
    out->where = (char *)s->where;
    out->state = (char *)s->state;
    out->reason = (char *)s->why;
    out->blocks = s->blocks;
    out->bytes = s->bytes;
    out->limit_bytes = s->limit;
    out->waiting = s->waiting;
    out->running = s->running;
    out->put = s->count[KVD_TIER_PUT][KVD_TIER_OK];
    out->hits = got[KVD_TIER_OK];
    out->misses = got[KVD_TIER_MISS];
    out->damaged = got[KVD_TIER_DAMAGED];
    for (int v = 0; v < KVD_TIER_VERBS; v++) {
        out->failed += s->count[v][KVD_TIER_FAILED] + s->count[v][KVD_TIER_TIMEOUT];
        out->refused += s->count[v][KVD_TIER_REFUSED] + s->count[v][KVD_TIER_FULL];
    }
    out->put_bytes = s->bytes_in;
    out->got_bytes = s->bytes_out;
}

void kvd_on_list_tiers(struct kvd_call *call, const void *request)
{
    (void)request;
    uint32_t n = kvd_tiers_count(call->d);
    struct kvd_tier_status status[KVD_TIERS_MOST];
    Kvd__V1__TierInfo infos[KVD_TIERS_MOST], *list[KVD_TIERS_MOST];
    Kvd__V1__ListTiersReply r = KVD__V1__LIST_TIERS_REPLY__INIT;
    for (uint32_t i = 0; i < n; i++) {
        kvd_tier_status(kvd_tiers_get_tier(call->d, i), &status[i]);
        fill_tier(&status[i], &infos[i]);
        list[i] = &infos[i];
    }
    r.n_tiers = n;
    r.tiers = list;
    kvd_call_reply(call, &r);
}

static void on_flushed(void *ctx, const struct kvd_tier_reply *reply)
{
    struct kvd_call *call = ctx;
    const Kvd__V1__FlushTierRequest *req = (const void *)call->request;
    const struct kvd_event_of_blocks e = {.kind = KVD__V1__EVENT__KIND__BLOCKS_CLEARED,
                                          .tier = req->name};
    Kvd__V1__FlushTierReply r = KVD__V1__FLUSH_TIER_REPLY__INIT;
    if (reply->result == KVD_TIER_OK) {
        kvd_notice("tier is flushed tier=%s", req->name);
        kvd_event_blocks(call->d, KVD_POOL_NONE, &e);
        kvd_call_reply(call, &r);
    } else {
        kvd_warning("tier is not flushed, or not all of it tier=%s: %s", req->name,
                    kvd_tier_result_name(reply->result));
        kvd_call_fail(
            call, KVD_E_UNAVAILABLE,
            "the tier was not flushed, or not all of it: %s (kvctl tier status says more)",
            kvd_tier_result_name(reply->result));
    }
}

void kvd_on_flush_tier(struct kvd_call *call, const void *request)
{
    const Kvd__V1__FlushTierRequest *req = request;
    struct kvd_tier *t = kvd_tiers_find(call->d, req->name);
    if (!t) {
        kvd_call_fail(call, KVD_E_NOT_FOUND,
                      "there is no tier '%.40s' here; kvctl tier status lists those that there are",
                      req->name);
        return;
    }
    kvd_tier_flush(t, on_flushed, call);
}

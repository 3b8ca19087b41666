// The table of methods: path, request type, handler, and who may call.
#include "daemon/service/methods.h"

#include "admin.pb-c.h"
#include "daemon/sched/op.h"
#include "daemon/service/handlers.h"
#include "daemon/session/fdsock.h"
#include "health.pb-c.h"
#include "kvd.pb-c.h"

static bool is_operator(const struct kvd_call *c)
{
    char ticket[KVD_SECRET_TEXT];
    const struct kvd_allow *admin = &c->d->config.admin;
    kvd_call_metadata(c, "kvd-ticket", ticket, sizeof(ticket));
    struct kvd_connection *conn = ticket[0] ? kvd_fdsock_find(c->d, ticket) : NULL;
    if (!conn)
        return kvd_call_peer_named(c, admin);
    int64_t uid = kvd_connection_peer(conn).uid;
    bool ok = uid == 0 || uid == (int64_t)getuid();
    for (uint32_t i = 0; i < admin->n_uids; i++)
        ok |= uid == (int64_t)admin->uids[i];
    return ok;
}

// After the handler: whether it streams, who may call, whether it is answered while draining.
#define KV(name, type, fn)                                                                         \
    {                                                                                              \
        "/kvd.v1.KvCache/" name, &kvd__v1__##type##__descriptor, kvd_on_##fn, false, NULL, true    \
    }
#define ADMIN(name, type, fn)                                                                      \
    {                                                                                              \
        "/kvd.v1.Admin/" name, &kvd__v1__##type##__descriptor, kvd_on_##fn, false, NULL, true      \
    }
#define OPERATOR(name, type, fn)                                                                   \
    {                                                                                              \
        "/kvd.v1.Admin/" name, &kvd__v1__##type##__descriptor, kvd_on_##fn, false, is_operator,    \
            true                                                                                   \
    }

const struct kvd_method kvd_methods[] = {
    {"/kvd.v1.KvCache/OpenSession", &kvd__v1__open_session_request__descriptor, kvd_on_open_session,
     false, NULL, false},
    KV("CloseSession", close_session_request, close_session),
    KV("KeepAlive", keep_alive_request, keep_alive),
    KV("RegisterBuffer", register_buffer_request, register_buffer),
    KV("ReleaseBuffer", release_buffer_request, release_buffer),
    KV("CreateSequences", create_sequences_request, create_sequences),
    KV("ForkSequence", fork_sequence_request, fork_sequence),
    KV("TruncateSequence", truncate_sequence_request, truncate_sequence),
    KV("PublishSequence", publish_sequence_request, publish_sequence),
    KV("AttachSequence", attach_sequence_request, attach_sequence),
    KV("FreeSequences", free_sequences_request, free_sequences),
    KV("DescribeSequences", describe_sequences_request, describe_sequences),
    KV("Append", append_request, append),
    KV("Attend", attend_request, attend),
    KV("Step", step_request, step),
    KV("Rotate", rotate_request, rotate),
    KV("ReadTokens", read_tokens_request, read_tokens),
    KV("MapSequences", map_sequences_request, map_sequences),
    KV("MatchPrefix", match_prefix_request, match_prefix),
    KV("AdoptPrefix", adopt_prefix_request, adopt_prefix),
    KV("PublishBlocks", publish_blocks_request, publish_blocks),
    KV("ReleasePrefix", release_prefix_request, release_prefix),
    KV("HintPrefix", hint_prefix_request, hint_prefix),
    KV("LookupPages", lookup_pages_request, lookup_pages),
    KV("HintPages", hint_pages_request, hint_pages),
    KV("PutPages", put_pages_request, put_pages),
    KV("GetPages", get_pages_request, get_pages),
    KV("EncodePages", encode_pages_request, encode_pages),
    {"/kvd.v1.KvCache/Watch", &kvd__v1__watch_request__descriptor, kvd_on_watch, true, NULL, true},
    {"/kvd.v1.KvCache/WatchNamespace", &kvd__v1__watch_namespace_request__descriptor,
     kvd_on_watch_namespace, true, is_operator, true},
    ADMIN("Ping", ping_request, ping),
    ADMIN("GetStatus", status_request, get_status),
    ADMIN("ListSessions", list_sessions_request, list_sessions),
    ADMIN("ListSequences", list_sequences_request, list_sequences),
    ADMIN("GetPool", get_pool_request, get_pool),
    ADMIN("ListNamespaces", list_namespaces_request, list_namespaces),
    ADMIN("GetMetrics", get_metrics_request, get_metrics),
    ADMIN("ListRotationSets", list_rotation_sets_request, list_rotation_sets),
    ADMIN("ListTiers", list_tiers_request, list_tiers),
    OPERATOR("FlushTier", flush_tier_request, flush_tier),
    ADMIN("ListPrefixes", list_prefixes_request, list_prefixes),
    ADMIN("ExplainPrefix", explain_prefix_request, explain_prefix),
    OPERATOR("PinPrefix", pin_prefix_request, pin_prefix),
    OPERATOR("ClassifyPrefix", classify_prefix_request, classify_prefix),
    OPERATOR("DropPrefix", drop_prefix_request, drop_prefix),
    OPERATOR("SetQuota", set_quota_request, set_quota),
    OPERATOR("Evict", evict_request, evict),
    OPERATOR("Verify", verify_request, verify),
    OPERATOR("Drain", drain_request, drain),
    OPERATOR("SetLogLevel", set_log_level_request, set_log_level),
    OPERATOR("Reload", reload_request, reload),
    OPERATOR("FetchRotationSet", fetch_rotation_set_request, fetch_rotation_set),
    {"/grpc.health.v1.Health/Check", &grpc__health__v1__health_check_request__descriptor,
     kvd_on_health_check, false, NULL, true},
    {"/grpc.health.v1.Health/Watch", &grpc__health__v1__health_check_request__descriptor,
     kvd_on_health_watch, true, NULL, true},
};

const uint32_t kvd_n_methods = KVD_LEN(kvd_methods);
_Static_assert(KVD_LEN(kvd_methods) < KVD_MAX_METHODS, "the last slot counts unknown methods");

// Handlers of requests, by file. The one of a call that is an operation is with it (sched/op_*.c).
#ifndef KVD_DAEMON_HANDLERS_H
#define KVD_DAEMON_HANDLERS_H

#include "daemon/rpc/rpc.h"

// worker.c
KVD_HANDLER(open_session);
KVD_HANDLER(close_session);
KVD_HANDLER(keep_alive);
KVD_HANDLER(register_buffer);
KVD_HANDLER(release_buffer);
// hints.c, hints_pages.c
KVD_HANDLER(hint_prefix);
KVD_HANDLER(hint_pages);
// events.c
KVD_HANDLER(watch);
KVD_HANDLER(watch_namespace);
// sequence.c
KVD_HANDLER(create_sequences);
KVD_HANDLER(fork_sequence);
KVD_HANDLER(truncate_sequence);
KVD_HANDLER(publish_sequence);
KVD_HANDLER(attach_sequence);
KVD_HANDLER(free_sequences);
KVD_HANDLER(describe_sequences);
// prompts.c
KVD_HANDLER(match_prefix);
KVD_HANDLER(adopt_prefix);
KVD_HANDLER(publish_blocks);
KVD_HANDLER(release_prefix);
// lookup.c
KVD_HANDLER(lookup_pages);
// prompts_admin.c
KVD_HANDLER(list_prefixes);
KVD_HANDLER(pin_prefix);
KVD_HANDLER(classify_prefix);
KVD_HANDLER(drop_prefix);
KVD_HANDLER(explain_prefix);
// admin.c
KVD_HANDLER(ping);
KVD_HANDLER(get_status);
KVD_HANDLER(list_sessions);
KVD_HANDLER(list_sequences);
KVD_HANDLER(get_pool);
KVD_HANDLER(list_namespaces);
KVD_HANDLER(get_metrics);
KVD_HANDLER(list_rotation_sets);
KVD_HANDLER(set_quota);
KVD_HANDLER(evict);
KVD_HANDLER(verify);
KVD_HANDLER(drain);
KVD_HANDLER(set_log_level);
KVD_HANDLER(reload);
KVD_HANDLER(fetch_rotation_set);
// tier.c
KVD_HANDLER(list_tiers);
KVD_HANDLER(flush_tier);
// health.c
KVD_HANDLER(health_check);
KVD_HANDLER(health_watch);

#endif

// The daemon's state.
//
// Three threads: the loop thread owns everything in struct kvd_daemon; the completion-queue thread
// only hands gRPC's tags over; the executor thread runs kernels and hands finished jobs back.
// Functions here belong to the loop thread unless they say otherwise.
#ifndef KVD_DAEMON_DAEMON_H
#define KVD_DAEMON_DAEMON_H

#include <uv.h>

#include "daemon/core/config.h"
#include "daemon/core/metrics.h"
#include "daemon/core/secret.h"
#include "kernels/backend.h"
#include "pool/pool.h"

enum {
    KVD_MAX_LAYOUTS = 64,
    KVD_MAX_NAMESPACES = 1024,
    KVD_MAX_LEASES = 32768, // of prefixes and pages; a namespace may have as many as are left
};

// The state of other rooms, each of which its own module knows.
struct kvd_call;
struct kvd_claims;
struct kvd_waits;
struct kvd_demotion;
struct kvd_exec;
struct kvd_fdsock;
struct kvd_metrics_pages;
struct kvd_pieceworks;
struct kvd_fences;
struct kvd_events;
struct kvd_download;
struct kvd_listing;
struct kvd_hints;
struct kvd_http;
struct kvd_keep;
struct kvd_ledger;
struct kvd_leases;
struct kvd_links;
struct kvd_listener;
struct kvd_memory_state;
struct kvd_method;
struct kvd_page_counts;
struct kvd_superseded_list;
struct kvd_part;
struct kvd_prompts;
struct kvd_queue;
struct kvd_restores;
struct kvd_rpc;
struct kvd_scrub;
struct kvd_tls;
struct kvd_session;
struct kvd_rooms;
struct kvd_spare;
struct kvd_steps;
struct kvd_tiers;
struct kvd_uploads;
struct kvd_user;
struct kvd_users;
struct kvd_work;
struct ssl_ctx_st; // OpenSSL's SSL_CTX

// A sequence's use by calls in flight: readers share, a writer is alone.
struct kvd_seq_use {
    uint64_t wanted; // the last look at what can start in which one was met that uses it
    uint32_t readers;
    bool writer;
};

enum kvd_state { KVD_STARTING, KVD_READY, KVD_DRAINING, KVD_STOPPING };

struct kvd_daemon {
    const struct kvd_part *const *parts; // NULL after the last
    const struct kvd_method *methods;
    uint32_t n_methods;
    struct kvd_config config;
    uv_loop_t loop;
    enum kvd_state state;
    char instance[KVD_SECRET_TEXT];
    uint64_t started_ms;
    const struct kvd_config_source *source; // what a reload reads
    struct kvd_config configured;           // as the source says; `config` is what is in force
    double reloaded_at;           // the last reload that was applied, or the start: Unix time
    bool reload_failed;           // the last one
    bool reloading, reload_again; // one is under way; another is to follow
    struct kvd_backend *backend;
    struct kvd_error no_gpu; // why it is the CPU's; empty: it is not
    struct kvd_keep *keep;   // NULL: nothing outlives this process
    struct kvd_memory_state *memory;
    struct kvd_pool *pool;
    struct kvd_evictable *evictable;
    struct kvd_spare *spare;
    struct kvd_rooms *rooms;
    struct kvd_scrub *scrub;
    struct kvd_rotation *rotations[KVD_MAX_LAYOUTS][KVD_MAX_PLANES]; // by the pool's layouts
    int rotation_fds[KVD_MAX_LAYOUTS][KVD_MAX_PLANES]; // the same for workers; -1: none
    struct kvd_ledger *ledger;                         // of what sessions hold
    struct kvd_session *sessions;                      // by id
    uint32_t n_sessions;
    uint64_t next_buffer;    // buffer ids are the daemon's, so that a stale one names nothing
    struct kvd_seq_use *use; // by sequence index
    struct kvd_rpc *rpc;
    struct kvd_exec *exec;
    struct kvd_uploads *uploads;
    struct kvd_queue *queue;
    struct kvd_fences *fences;
    struct kvd_download *downloads; // those that run, and after them those that wait
    struct kvd_listing *listing;    // of the store, which more may wait for; NULL: none
    struct kvd_work *works;         // that are not done, linked by next_work
    struct kvd_fdsock *fdsock;
    struct kvd_http *http;
    struct kvd_evict *evict;
    struct kvd_events *events;
    struct kvd_pieceworks *pieceworks;
    struct kvd_tiers *tiers;       // NULL: there are none
    struct kvd_demotion *demotion; // NULL: the same; so is this
    struct kvd_restores *restores;
    struct kvd_claims *claims;
    struct kvd_waits *waits;
    struct kvd_hints *hints;
    struct kvd_leases *leases;
    struct kvd_prompts *prompts;
    struct kvd_page_counts *page_counts;
    struct kvd_superseded_list *superseded;
    struct kvd_steps *steps;
    struct kvd_metrics_pages *metrics_pages;
    struct kvd_users *users;
    struct kvd_user *namespace_users[KVD_MAX_NAMESPACES]; // who is charged; NULL: nobody
    struct kvd_user *layout_users[KVD_MAX_LAYOUTS];
    struct kvd_links *links;
    struct kvd_tls *tls; // NULL without [tls]
    struct ssl_ctx_st
        *tls_context; // what its connections show from now on; a reload may replace it
    struct kvd_listener *listeners;
    struct kvd_metrics metrics;
    struct kvd_call *health_watchers; // linked by call->next_watch
    uv_signal_t sig_term, sig_int, sig_hup;
    uv_timer_t watchdog, lease_timer, drain_timer, memory_timer, device_timer;
    uint64_t drain_deadline_ms, lease_look_ms; // when leases are looked at next
    uint32_t pool_works; // on libuv's thread pool; gRPC must outlive them, as they answer calls
    int lock_fds[KVD_MAX_LISTEN];
    uint32_t n_locks;
    bool shut; // all calls are answered: what is left lets go of those who called
    int exit_code;
};

static inline uint64_t kvd_now_ms(const struct kvd_daemon *d)
{
    return uv_now(&d->loop);
}

#endif

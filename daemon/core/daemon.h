// The daemon's state and its parts.
//
// Three threads: the loop thread owns everything in struct kvd_daemon; the completion-queue thread
// only hands gRPC's tags over; the executor thread runs kernels and hands finished jobs back.
// Functions here belong to the loop thread unless they say otherwise.
#ifndef KVD_DAEMON_DAEMON_H
#define KVD_DAEMON_DAEMON_H

#include <grpc/grpc.h>
#include <uthash.h>
#include <uv.h>

#include "calib/store.h"
#include "daemon/core/config.h"
#include "daemon/core/metrics.h"
#include "kernels/backend.h"
#include "pool/pool.h"
#include "proto/fdsock.h"

enum {
    KVD_SECRET_TEXT = 33, // 16 random bytes in hex, and a NUL
    KVD_MAX_LAYOUTS = 64,
    KVD_MAX_NAMESPACES = 1024,
    KVD_REPLAY_BYTES = 1 << 20, // of them, as long as all sessions' fit KVD_REPLAY_TOTAL
    KVD_REPLAY_TOTAL = 256 << 20,
    KVD_REPLAY_SLOTS = 256,       // replies remembered per session
    KVD_EVENT_SLOTS = 256,        // events that wait for a slow reader
    KVD_MAX_HELD = 65536,         // sequences held by one session
    KVD_MAX_BUFFERS = 1024,       // per session
    KVD_HELLO_TIMEOUT_MS = 10000, // an fd connection must open a session by then
};

struct kvd_daemon;
struct kvd_call;
struct kvd_rpc;
struct kvd_exec;   // exec.h
struct kvd_fetch;  // rotations.c
struct kvd_queue;  // queue.h
struct kvd_fences; // fences.c
struct kvd_fdsock;
struct kvd_http;

// Memory of a worker. Jobs hold references, so that releasing it does not unmap it under a
// kernel.
struct kvd_buffer {
    struct kvd_daemon *d;
    uint64_t id, key;
    enum kvd_memory kind;
    uint8_t *data;
    uint64_t size;
    uint32_t refs;
    struct kvd_user *user; // whose share it is
    UT_hash_handle hh;
};

struct kvd_held {
    uint64_t seq;
    uint32_t holds; // times that it was made or attached, less times that it was freed
    UT_hash_handle hh;
};

// The reply to a call with a request id, for when it is repeated.
struct kvd_replay {
    uint64_t request_id;
    const void *method;
    uint8_t *data;
    size_t len;
};

struct kvd_connection; // fdsock.c: a worker's fd-socket connection

struct kvd_session {
    char secret[KVD_SECRET_TEXT];
    uint64_t id;
    uint64_t appender; // random: names the session in the pool's records, which may outlive it
    uint32_t ns, layout;
    char client_name[KVD_MAX_CLIENT_NAME + 1];
    struct kvd_connection *connection; // NULL: leased
    int64_t pid, uid;
    struct kvd_user *user; // who is charged
    uint32_t lease_ms;
    uint64_t opened_ms, used_ms;
    uint64_t calls;
    uint64_t open_request; // request_id of its OpenSession
    struct kvd_held *held;
    struct kvd_buffer *buffers;
    uint64_t buffer_bytes;
    uint32_t *extents; // per extent: the version that was sent over the fd socket; NULL: none yet
    bool rotations_sent;
    struct kvd_replay replays[KVD_REPLAY_SLOTS];
    uint32_t next_replay;
    size_t replay_bytes;
    struct kvd_call *watchers; // linked by call->next_watch
    UT_hash_handle hh;
};

// A sequence's use by calls in flight: readers share, a writer is alone.
struct kvd_seq_use {
    uint16_t readers;
    bool writer;
};

enum kvd_state { KVD_STARTING, KVD_READY, KVD_DRAINING, KVD_STOPPING };

struct kvd_memory_state; // memory.c
struct kvd_users;        // users.c
struct kvd_links;        // links.c
struct kvd_listener;     // listen.c

struct kvd_daemon {
    struct kvd_config config;
    uv_loop_t loop;
    enum kvd_state state;
    char instance[KVD_SECRET_TEXT];
    uint64_t started_ms;
    const struct kvd_config_source *source; // what a reload reads
    struct kvd_config configured;           // as the source says; `config` is what is in force
    uint64_t evictable, evictable_at_ms, evictable_by_ns[KVD_MAX_NAMESPACES]; // metrics.c
    double reloaded_at;           // the last reload that was applied, or the start: Unix time
    bool reload_failed;           // the last one
    bool reloading, reload_again; // one is under way; another is to follow
    struct kvd_backend *backend;
    struct kvd_memory_state *memory;
    struct kvd_pool *pool;
    struct kvd_rotation *rotations[KVD_MAX_LAYOUTS]; // by pool layout
    int rotation_fds[KVD_MAX_LAYOUTS];               // the same for workers; -1: none
    struct kvd_session *sessions;                    // by secret
    uint64_t next_session,
        next_buffer; // buffer ids are the daemon's, never a session's, so a stale one names nothing
    struct kvd_seq_use *use; // by sequence index
    struct kvd_rpc *rpc;
    struct kvd_exec *exec;
    struct kvd_queue *queue;
    struct kvd_fences *fences;
    struct kvd_fetch *downloads; // those that run, and after them those that wait
    struct kvd_work *works;      // that are not done, linked by next_work
    struct kvd_fdsock *fdsock;
    struct kvd_http *http;
    struct kvd_users *users;
    struct kvd_user *namespace_users[KVD_MAX_NAMESPACES]; // who is charged; NULL: nobody
    struct kvd_user *layout_users[KVD_MAX_LAYOUTS];
    struct kvd_links *links;
    struct kvd_listener *listeners;
    struct kvd_metrics metrics;
    struct kvd_call *health_watchers; // linked by call->next_watch
    uv_signal_t sig_term, sig_int, sig_hup;
    uv_timer_t watchdog, lease_timer, drain_timer, memory_timer;
    uint64_t drain_deadline_ms;
    uint32_t pool_works; // on libuv's thread pool; gRPC must outlive them, as they answer calls
    int lock_fds[KVD_MAX_LISTEN];
    uint32_t n_locks;
    int exit_code;
};

static inline uint64_t kvd_now_ms(const struct kvd_daemon *d)
{
    return uv_now(&d->loop);
}

// A fresh random secret in hex. Any thread.
void kvd_secret_new(char out[KVD_SECRET_TEXT]);

// -- main.c, lifecycle.c ------------------------------------------------------------------------
int kvd_daemon_init(struct kvd_daemon *d, struct kvd_error *err);
void kvd_daemon_run(struct kvd_daemon *d);
void kvd_daemon_deinit(struct kvd_daemon *d);
// Takes no new sessions, tells the workers, and stops when the last session ends or the time is
// over.
void kvd_daemon_drain(struct kvd_daemon *d, uint64_t timeout_ms);
// What a reload did, line by line.
struct kvd_reload {
    struct kvd_lines errors;  // if there are any, nothing has changed
    struct kvd_lines changed; // and is in force
    struct kvd_lines restart; // differs, but is read at start only
    struct kvd_lines kept;    // was set at run time, and the files say what they said before
};
typedef void kvd_reload_fn(struct kvd_daemon *d, const struct kvd_reload *report, void *ctx);
// Reads the configuration again, on libuv's thread pool, and puts it in force. Then logs what came
// of it and calls `done` (NULL: nobody wants to know) with the same lines. KVD_E_UNAVAILABLE while
// another is under way; without `done`, one more follows it.
int kvd_daemon_reload(struct kvd_daemon *d, kvd_reload_fn *done, void *ctx,
                      struct kvd_error *err); // reload.c
// To be called when the backend failed: without a device the daemon stops, for a new one to start.
void kvd_daemon_check_device(struct kvd_daemon *d);
// To be called when a session ended: a draining daemon may be done.
void kvd_daemon_session_ended(struct kvd_daemon *d);
// Brackets work on libuv's thread pool that needs the daemon when it ends: stopping waits for it.
void kvd_daemon_work_begin(struct kvd_daemon *d);
void kvd_daemon_work_end(struct kvd_daemon *d);

// -- session.c ----------------------------------------------------------------------------------
// The session of a secret, marked as used; NULL if there is none.
struct kvd_session *kvd_session_find(struct kvd_daemon *d, const char *secret);
// A session of a user, who is charged. It takes over the holds on namespace and layout.
// KVD_E_LIMIT: the user or the namespace has enough of them.
int kvd_session_new(struct kvd_daemon *d, uint32_t ns, uint32_t layout, struct kvd_connection *conn,
                    int64_t uid, struct kvd_session **out, struct kvd_error *err);
// Ends a session: releases its sequences and buffers, ends its event streams, forgets it.
void kvd_session_end(struct kvd_daemon *d, struct kvd_session *s, const char *why);
// How many times the session holds a sequence. In the pool it is one holder, however many.
uint32_t kvd_session_holds(const struct kvd_session *s, uint64_t seq);
// Adds a hold; *first tells that it was the first, which the pool wants to know. KVD_E_LIMIT.
int kvd_session_add_held(struct kvd_session *s, uint64_t seq, bool *first, struct kvd_error *err);
// Takes one away; true if it was the last.
bool kvd_session_drop_held(struct kvd_session *s, uint64_t seq);
struct kvd_buffer *kvd_session_buffer(struct kvd_session *s, uint64_t id);
// What the host makes possible of workers' buffers: to be called once, at start.
void kvd_session_measure_host(struct kvd_daemon *d);
// Maps a worker's memory. The fd stays the caller's. KVD_E_INVALID (seals, size, holes, not
// memory), KVD_E_UNSUPPORTED, KVD_E_QUOTA, KVD_E_LIMIT.
int kvd_session_add_buffer(struct kvd_daemon *d, struct kvd_session *s, uint64_t key,
                           const struct kvd_foreign *memory, struct kvd_buffer **out,
                           struct kvd_error *err);
void kvd_buffer_unref(struct kvd_buffer *b);
void kvd_session_drop_buffer(struct kvd_session *s, struct kvd_buffer *b);
// Ends leased sessions whose time is over.
void kvd_session_expire(struct kvd_daemon *d);

// -- reclaim.c ----------------------------------------------------------------------------------
// Unmaps, or closes, what may be the last reference to much memory, on libuv's thread pool.
void kvd_reclaim_mapping(struct kvd_daemon *d, void *data, uint64_t size);
void kvd_reclaim_fd(struct kvd_daemon *d, int fd);

// -- tenants.c ----------------------------------------------------------------------------------
// Finds or makes a namespace for a user, who is charged as long as it lasts, and holds it; to be
// given back with kvd_namespace_close. KVD_E_DENIED: not listed, where only those may be.
// KVD_E_LIMIT.
int kvd_namespace_open(struct kvd_daemon *d, int64_t uid, const char *name, uint32_t *ns,
                       struct kvd_error *err);
void kvd_namespace_close(struct kvd_daemon *d, uint32_t ns);
// The same for a layout, which kvd_pool_layout_unref gives back.
int kvd_layout_open(struct kvd_daemon *d, int64_t uid, uint32_t ns, const struct kvd_layout *g,
                    const uint64_t page_bytes[KVD_POOL_KINDS], uint32_t *layout, bool *recycled,
                    struct kvd_error *err);
// Whether a namespace may be at all.
int kvd_namespace_listed(const struct kvd_daemon *d, const char *name, struct kvd_error *err);
// At the end: nobody is charged any more.
void kvd_tenants_deinit(struct kvd_daemon *d);

// -- memory.c -----------------------------------------------------------------------------------
// The pool's memory: extents of the backend, made ahead of need, lent to workers for reading.
int kvd_memory_init(struct kvd_daemon *d, struct kvd_error *err);
void kvd_memory_deinit(struct kvd_daemon *d);
struct kvd_pool_mem_ops kvd_memory_ops(struct kvd_daemon *d);
// Sees to it that spare extents are made, on libuv's thread pool.
void kvd_memory_ahead(struct kvd_daemon *d);
// Lends the session the extent of an address, unless it has it. KVD_E_LIMIT: the fd socket is full.
int kvd_memory_lend(struct kvd_daemon *d, struct kvd_session *s, uint64_t addr,
                    struct kvd_error *err);
// Forgets what the session was lent.
void kvd_memory_forget(struct kvd_daemon *d, struct kvd_session *s);
// Lends it its rotation set.
int kvd_memory_lend_rotations(struct kvd_daemon *d, struct kvd_session *s, struct kvd_error *err);
// Page number on the wire of an address; 0 has UINT32_MAX.
uint32_t kvd_memory_page_number(const struct kvd_daemon *d, uint64_t addr);
uint32_t kvd_memory_extents(const struct kvd_daemon *d);

// -- fdsock.c -----------------------------------------------------------------------------------
int kvd_fdsock_init(struct kvd_daemon *d, const char *path, struct kvd_error *err);
// Closes all; their sessions end. NULL is allowed.
void kvd_fdsock_deinit(struct kvd_daemon *d);
// The connection that a ticket was given to, or NULL.
struct kvd_connection *kvd_fdsock_find(struct kvd_daemon *d, const char *ticket);
struct kvd_peer {
    int64_t pid, uid, gid;
};
struct kvd_peer kvd_connection_peer(const struct kvd_connection *c);
struct kvd_session *kvd_connection_session(const struct kvd_connection *c);
// Ties a session to a connection (or unties it with NULL).
void kvd_connection_bind(struct kvd_connection *c, struct kvd_session *s);
// Sends a message, with fd unless it is -1 (it stays the caller's). KVD_E_LIMIT when the worker
// does not read; KVD_E_UNAVAILABLE when it has hung up.
int kvd_connection_send(struct kvd_connection *c, const struct kvd_fd_grant *grant, int fd,
                        struct kvd_error *err);
// Takes the fd sent under a key out of a connection; -1 if there is none.
int kvd_connection_take_fd(struct kvd_connection *c, uint64_t key);
// Hangs up: after its session was ended by the worker itself or by an operator.
void kvd_connection_close(struct kvd_connection *c);
uint32_t kvd_fdsock_count(const struct kvd_daemon *d);

// -- http.c, notify.c ---------------------------------------------------------------------------
int kvd_http_init(struct kvd_daemon *d, struct kvd_error *err);
void kvd_http_deinit(struct kvd_daemon *d);
void kvd_notify_ready(struct kvd_daemon *d);
void kvd_notify_stopping(void);
void kvd_notify_deinit(struct kvd_daemon *d);

// Bytes that evicting would free, in all and (unless by_namespace is NULL) of each namespace: a
// look at the pool that is at most a second old, as looking takes time.
uint64_t kvd_evictable(struct kvd_daemon *d, const uint64_t **by_namespace);

// The whole /metrics page. The caller frees it.
char *kvd_metrics_page(struct kvd_daemon *d);

#endif

// A part of the daemon: what it does at each turn of the daemon's life, and when something happens
// that others want to know. lifecycle.c walks the table of all parts (parts.c), so nothing calls
// upwards. Every function may be NULL. Loop thread.
#ifndef KVD_DAEMON_PART_H
#define KVD_DAEMON_PART_H

#include "daemon/core/daemon.h"

struct kvd_part {
    // -- its life, in this order. Starting goes down the table, ending up.
    // Sets it up. After a failure `end` and `deinit` of all parts are called: they take back what
    // there is.
    int (*init)(struct kvd_daemon *d, struct kvd_error *err);
    // All are set up. The same holds after a failure.
    int (*start)(struct kvd_daemon *d, struct kvd_error *err);
    // Takes on nothing new, and gives up what it does. What cannot be given up at once is `busy`;
    // kvd_daemon_go_on tells that it no longer is.
    void (*stop)(struct kvd_daemon *d);
    bool (*busy)(const struct kvd_daemon *d);
    // Nothing is busy any more, so all calls are answered: lets go of those who called.
    void (*shut)(struct kvd_daemon *d);
    // Closes its handles. The loop runs until they are closed.
    void (*end)(struct kvd_daemon *d);
    // The loop is gone: frees the rest.
    void (*deinit)(struct kvd_daemon *d);

    // -- what happens
    // No new sessions are taken any more, and workers should leave.
    void (*draining)(struct kvd_daemon *d);
    // A session ends. It still has all that it holds.
    void (*session_ends)(struct kvd_daemon *d, struct kvd_session *s);
    // A published sequence was evicted.
    void (*evicted)(struct kvd_daemon *d, uint32_t ns, uint64_t seq, const char *name);
    // A block of a namespace's prefix index is gone.
    void (*block_gone)(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                       const struct kvd_prefix_removed *removed);
    // A superseded page has lost its last holder, or is superseded no longer.
    void (*superseded_over)(struct kvd_daemon *d);
    // Blocks of a namespace's prefix index are there, each behind the one before it and the first
    // behind `parent` (NULL: none, or not known).
    void (*blocks_stored)(struct kvd_daemon *d, uint32_t ns, const struct kvd_prefix_key *keys,
                          uint32_t n, const struct kvd_prefix_key *parent);
    // Renders its metrics (metrics.h).
    void (*metrics)(struct kvd_daemon *d, FILE *f);
};

// Tell all parts.
void kvd_parts_session_ends(struct kvd_daemon *d, struct kvd_session *s);
void kvd_parts_evicted(struct kvd_daemon *d, uint32_t ns, uint64_t seq, const char *name);
void kvd_parts_block_gone(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                          const struct kvd_prefix_removed *removed);
void kvd_parts_superseded_over(struct kvd_daemon *d);
void kvd_parts_blocks_stored(struct kvd_daemon *d, uint32_t ns, const struct kvd_prefix_key *keys,
                             uint32_t n, const struct kvd_prefix_key *parent);

#endif

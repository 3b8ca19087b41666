// Counters of what is brought back from tiers. Loop thread.
#ifndef KVD_DAEMON_RESTORE_COUNTS_H
#define KVD_DAEMON_RESTORE_COUNTS_H

#include "daemon/core/metrics.h"
#include "daemon/tier/tiers.h"

struct kvd_restore_counts {
    uint64_t blocks[KVD_TIERS_MOST], bytes, missed, followed;
    struct kvd_histogram seconds;
    uint64_t looks_ns, copies_ns, waits_ns, copies;
};

// running: restores.
void kvd_restore_counts_metrics(const struct kvd_daemon *d, FILE *f,
                                const struct kvd_restore_counts *c, double running);

#endif

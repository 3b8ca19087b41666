// Copies into pages that follow each other without a gap: an upload is a job of the executor to
// which more can be added while it runs, and of which some copies are under way while the next ones
// are begun. The loop hears of what is done as it is done. Copies of which one lies as far behind
// the other here as there are made at once: to begin one costs a bus some 3 us, in which it could
// copy 150 KB. Loop thread.
#ifndef KVD_DAEMON_UPLOAD_H
#define KVD_DAEMON_UPLOAD_H

#include "daemon/core/part.h"
#include "daemon/sched/fair.h"
#include "kernels/backend.h"

struct kvd_upload;

enum { KVD_UPLOAD_MOST = 256 }; // pieces that are added and not done

struct kvd_upload_copy {
    uint64_t to, from, bytes; // addresses
    // In what they lie: memory that is one for whoever copies. What lies elsewhere is not copied at
    // once with it; nor is anything else if `from_in` is 0.
    uint64_t to_in, from_in;
};

// More is done, or the job has ended: with `ended` what was added and is not done will not be,
// because of `rc` (a failure of the device) or as it was cancelled or kvd stops. Never called from
// within a call of this module.
typedef void kvd_upload_moved(void *ctx, bool ended, int rc);
// It is done in the turn of namespace `ns`, charged to `flow`, which must outlive its jobs. NULL:
// out of memory.
struct kvd_upload *kvd_upload_new(struct kvd_daemon *d, uint32_t ns, struct kvd_fair_flow *flow,
                                  kvd_upload_moved *moved, void *ctx);
// Not while it runs. *u may be NULL and becomes NULL.
void kvd_upload_free(struct kvd_upload **u);

// Whether there is room for a piece.
bool kvd_upload_has_room(const struct kvd_upload *u);
// Adds one of n <= KVD_MAX_PLANES copies, or of none. What it copies from and to stays until it is
// done, or all has ended.
void kvd_upload_add(struct kvd_upload *u, const struct kvd_upload_copy *copies, uint32_t n);
// How many pieces are done, all in all, in the order in which they were added.
uint32_t kvd_upload_done(const struct kvd_upload *u);
// From the first that is added until `moved` was called with `ended`.
bool kvd_upload_runs(const struct kvd_upload *u);
// It ends soon.
void kvd_upload_cancel(struct kvd_upload *u);
// How long the executor has been at it, and how many copies it has made of all.
uint64_t kvd_upload_ran_ns(const struct kvd_upload *u);
uint64_t kvd_upload_copies(const struct kvd_upload *u);

extern const struct kvd_part kvd_part_uploads;

#endif

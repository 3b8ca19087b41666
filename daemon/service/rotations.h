// Rotation sets for layouts: found in the backend, built in, cached, or fetched from the store
// in the background.
#ifndef KVD_DAEMON_ROTATIONS_H
#define KVD_DAEMON_ROTATIONS_H

#include "calib/store.h"
#include "daemon/core/part.h"

// `set` is the callee's; NULL with `failure`, and where nothing is to be fetched.
typedef void kvd_rotations_done(void *ctx, struct kvd_rotset *set, const struct kvd_error *failure);

// Gets the set that g->rotation names and replaces the name by the set's digest (built-in names
// stay). Calls back on the loop, perhaps at once: without a set for codecs that rotate nothing, and
// for sets that are built in. Downloads are bounded in number and by user (downloads.h); what is
// built in or cached under its digest does not wait for them. When the call is cancelled its
// download ends.
void kvd_rotations_get(struct kvd_call *call, struct kvd_layout *g, kvd_rotations_done *done,
                       void *ctx);
// The same of a name that a store may have.
void kvd_rotations_fetch(struct kvd_call *call, const char *ref, kvd_rotations_done *done,
                         void *ctx);

// The pool's layout of a resolved g, with its rotations in the backend's memory and a reference
// that the session gives back (kvd_pool_layout_unref). KVD_E_PRECONDITION when the set does not
// fit the layout.
int kvd_rotations_bind(struct kvd_daemon *d, const struct kvd_layout *g,
                       const struct kvd_rotset *set, int64_t uid, uint32_t ns, uint32_t *layout,
                       struct kvd_error *err);

// The store as it is configured now, for a thread. The texts are copies: a reload changes the
// daemon's, and a key that is half of one would decide what is taken.
struct kvd_rotations_store {
    struct kvd_store_config config; // points to what follows
    char url[KVD_CONFIG_TEXT], cache[KVD_CONFIG_TEXT], public_key[KVD_CONFIG_TEXT];
    _Atomic bool given_up; // nobody wants it any more
};
// `out` is to stay where it is.
void kvd_rotations_store(const struct kvd_daemon *d, struct kvd_rotations_store *out);

extern const struct kvd_part kvd_part_rotations;

#endif

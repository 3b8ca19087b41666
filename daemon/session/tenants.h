// Who is charged for namespaces and layouts. Loop thread.
#ifndef KVD_DAEMON_TENANTS_H
#define KVD_DAEMON_TENANTS_H

#include "daemon/core/part.h"
#include "pool/pool.h"

// Finds or makes a namespace for a user, who is charged as long as it lasts, and holds it; to be
// given back with kvd_namespace_close. KVD_E_DENIED: not listed, where only those may be.
// KVD_E_LIMIT.
int kvd_namespace_open(struct kvd_daemon *d, int64_t uid, const char *name, uint32_t *ns,
                       struct kvd_error *err);
void kvd_namespace_close(struct kvd_daemon *d, uint32_t ns);
// The same for a layout, which kvd_pool_layout_unref gives back.
int kvd_layout_open(struct kvd_daemon *d, int64_t uid, uint32_t ns, const struct kvd_layout *g,
                    const uint64_t (*page_bytes)[KVD_POOL_KINDS], uint32_t *layout, bool *recycled,
                    struct kvd_error *err);
// What would have to be cleared first for the user to open the namespace and the layout. False:
// nothing. Both clear it themselves, in one go, so whoever opens clears it before, in pieces.
bool kvd_tenants_clear(struct kvd_daemon *d, int64_t uid, const char *name,
                       const struct kvd_layout *g, struct kvd_pool_clearing *c);
// Whether a namespace may be at all.
int kvd_namespace_listed(const struct kvd_daemon *d, const char *name, struct kvd_error *err);

extern const struct kvd_part kvd_part_tenants;

#endif

// Eviction by operators, and dropping of prefixes. It takes time in proportion
// to what there is, and so is done in pieces, between which the loop does other things. Loop
// thread.
#ifndef KVD_DAEMON_EVICT_H
#define KVD_DAEMON_EVICT_H

#include "daemon/core/part.h"
#include "pool/prefix.h"

struct kvd_call;

// Drops all prefixes of a namespace that nobody holds, and answers the call, which is DropPrefix.
void kvd_evict_prefixes(struct kvd_call *call, const char *ns);
// The same of one block, and of those before it that have no others behind them.
void kvd_evict_prefix(struct kvd_call *call, const char *ns, const struct kvd_prefix_key *key);

extern const struct kvd_part kvd_part_evict;

#endif

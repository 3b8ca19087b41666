// What callers know of how prompts and pages will be used. Loop thread.
#ifndef KVD_DAEMON_HINTS_H
#define KVD_DAEMON_HINTS_H

#include "daemon/core/part.h"
#include "kvd.pb-c.h"
#include "pool/blocks.h"

struct kvd_hints_prefetch;

struct kvd_hints {
    struct kvd_hints_prefetch *prefetches;
    uint32_t running;
    // Prompts, and lists of pages; but for `demoted` and `classified`: blocks.
    uint64_t retained, demoted, classified, prefetched;
};

// What is to be brought back, for nobody in particular.
struct kvd_hints_ask {
    struct kvd_blocks_space space;
    const struct kvd_prefix_key *keys; // copied, as `skip` is
    uint32_t n;
    uint32_t from;       // so many of a prompt are there
    const uint8_t *skip; // of pages, true for those that are not wanted; NULL: it is a prompt
    uint32_t retain_ms;  // what came is retained; 0: it is not
    int64_t uid;         // who is charged for that
};
// Begins with it. KVD_E_LIMIT: enough is under way.
int kvd_hints_prefetch(struct kvd_daemon *d, const struct kvd_hints_ask *ask,
                       struct kvd_error *err);
// Whether the hint's numbers go together. KVD_E_INVALID.
int kvd_hints_check(Kvd__V1__HintPrefixRequest__Hint hint, uint32_t ms, bool expire,
                    struct kvd_error *err);
// The class that a hint gives, of those that give one.
bool kvd_hints_class(Kvd__V1__HintPrefixRequest__Hint hint, enum kvd_prefix_class *class);
void kvd_hints_count(struct kvd_daemon *d, enum kvd_prefix_class class, uint32_t blocks);

extern const struct kvd_part kvd_part_hints;

#endif

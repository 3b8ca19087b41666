// Exact pages that encoded ones have taken the place of, and that somebody holds still: they go
// when the last lease of each has ended. Loop thread. A list in memory: after a restart such a page
// is there both ways, and counts as exact until EncodePages names it again.
#ifndef KVD_DAEMON_SUPERSEDED_H
#define KVD_DAEMON_SUPERSEDED_H

#include "daemon/core/part.h"
#include "pool/blocks.h"

// A page in both spaces: of encoded pages, and of exact ones.
struct kvd_superseded {
    struct kvd_blocks_space spaces[2];
    struct kvd_prefix_key keys[2];
};
// Notes one that is held. Where the list is full it is taken back: the page counts as exact.
void kvd_superseded_note(struct kvd_daemon *d, const struct kvd_superseded *page);

extern const struct kvd_part kvd_part_exact;

#endif

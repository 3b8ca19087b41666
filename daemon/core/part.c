#include "daemon/core/part.h"

void kvd_parts_session_ends(struct kvd_daemon *d, struct kvd_session *s)
{
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->session_ends)
            (*p)->session_ends(d, s);
}

void kvd_parts_evicted(struct kvd_daemon *d, uint32_t ns, uint64_t seq, const char *name)
{
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->evicted)
            (*p)->evicted(d, ns, seq, name);
}

void kvd_parts_block_gone(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                          const struct kvd_prefix_removed *removed)
{
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->block_gone)
            (*p)->block_gone(d, ns, layout, removed);
}

void kvd_parts_superseded_over(struct kvd_daemon *d)
{
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->superseded_over)
            (*p)->superseded_over(d);
}

void kvd_parts_blocks_stored(struct kvd_daemon *d, uint32_t ns, const struct kvd_prefix_key *keys,
                             uint32_t n, const struct kvd_prefix_key *parent)
{
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->blocks_stored)
            (*p)->blocks_stored(d, ns, keys, n, parent);
}

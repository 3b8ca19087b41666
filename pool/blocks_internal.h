// What blocks.c, adopt.c and flat.c share. Private to them.
#ifndef KVD_POOL_BLOCKS_INTERNAL_H
#define KVD_POOL_BLOCKS_INTERNAL_H

#include "pool/blocks.h"
#include "pool/internal.h"

struct blocks_room {
    uint32_t path[KVD_BLOCKS_MAX]; // entries of blocks, from the first on
    uint32_t none[KVD_BLOCKS_MAX]; // values of blocks that have no pages yet
    struct block_pages pages[KVD_BLOCKS_MAX];
};

// Room to work in, the pool's. NULL: out of memory.
struct blocks_room *blocks_room(struct kvd_pool *pool, struct kvd_error *err);
// The entries of the blocks up to `entry`, which is the last of `depth`.
void blocks_path(const struct kept *k, uint32_t entry, uint32_t depth, uint32_t *path);

// The sequence, if it is of the space's namespace and layout. KVD_E_NOT_FOUND, KVD_E_PRECONDITION.
int blocks_seq(const struct kvd_pool *pool, const struct kvd_blocks_space *space, uint64_t seq,
               const struct region_seq **out, struct kvd_error *err);
// The domain of a space, held, made if there is none, and room for it. KVD_E_LIMIT.
int blocks_domain(struct kvd_pool *pool, struct kept *k, const struct kvd_blocks_space *space,
                  uint32_t *domain, struct kvd_error *err);

// The least length, besides 0, to which a sequence can be truncated.
uint64_t blocks_least_length(const struct kvd_pool *pool, const struct region_seq *s);

#endif

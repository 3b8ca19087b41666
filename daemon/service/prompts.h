// Prefixes: prompts whose blocks others can go on from. Loop thread.
#ifndef KVD_DAEMON_PROMPTS_H
#define KVD_DAEMON_PROMPTS_H

#include "daemon/core/part.h"
#include "kvd.pb-c.h"
#include "pool/blocks.h"

// -- prompt_keys.c ------------------------------------------------------------------------------
// The blocks that a request names. KVD_E_INVALID says what to mend.
int kvd_prompt_check(const Kvd__V1__PrefixKeys *keys, uint32_t *blocks, struct kvd_error *err);
// What separates them from others. KVD_E_INTERNAL.
int kvd_prompt_space(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                     const Kvd__V1__PrefixKeys *keys, struct kvd_blocks_space *out,
                     struct kvd_error *err);
// kvd's keys of blocks [from, to), into out[from..], from those before.
int kvd_prompt_keys(const struct kvd_blocks_space *space, const Kvd__V1__PrefixKeys *keys,
                    uint32_t from, uint32_t to, struct kvd_prefix_key *out, struct kvd_error *err);
// Why a request's first block is not there: it may be under other extra keys, or another layout.
Kvd__V1__MissReason kvd_prompt_miss(struct kvd_daemon *d, const struct kvd_blocks_space *space,
                                    const Kvd__V1__PrefixKeys *keys,
                                    const struct kvd_blocks_match *match);
Kvd__V1__MissReason kvd_miss_reason(enum kvd_prefix_reason reason);

// So many tokens of a namespace's prompts were adopted.
void kvd_prompts_adopted(struct kvd_daemon *d, uint32_t ns, uint64_t tokens);

extern const struct kvd_part kvd_part_prompts;

#endif

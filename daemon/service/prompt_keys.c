// What names a prompt's blocks, from the wire to keys of the prefix index.
#include "daemon/service/layout.h"
#include "daemon/service/prompts.h"

enum { ELSEWHERE = 64 }; // domains that are looked at for a miss

int kvd_prompt_check(const Kvd__V1__PrefixKeys *k, uint32_t *blocks, struct kvd_error *err)
{
    size_t bytes = 0, n;
    *blocks = 0;
    if (!k)
        return kvd_fail(err, KVD_E_INVALID, "a prompt has no keys");
    for (size_t i = 0; i < k->n_extra; i++)
        bytes += k->extra[i].len;
    if (bytes > KVD_MAX_PROMPT_EXTRA_BYTES)
        return kvd_fail(err, KVD_E_INVALID, "extra keys of %zu bytes; at most %d are possible",
                        bytes, KVD_MAX_PROMPT_EXTRA_BYTES);
    if (k->block_keys.len && k->tokens.len)
        return kvd_fail(err, KVD_E_INVALID, "a prompt has block keys or tokens, not both");
    if (k->tokens.len % 4)
        return kvd_fail(err, KVD_E_INVALID, "tokens of %zu bytes: each has 4", k->tokens.len);
    if (k->block_keys.len || k->key_bytes) {
        if (k->key_bytes < KVD_MIN_BLOCK_KEY || k->key_bytes > KVD_MAX_BLOCK_KEY)
            return kvd_fail(err, KVD_E_INVALID, "block keys of %u bytes: %d to %d are possible",
                            k->key_bytes, KVD_MIN_BLOCK_KEY, KVD_MAX_BLOCK_KEY);
        if (k->block_keys.len % k->key_bytes)
            return kvd_fail(err, KVD_E_INVALID, "%zu bytes of block keys are no keys of %u bytes",
                            k->block_keys.len, k->key_bytes);
        n = k->block_keys.len / k->key_bytes;
    } else {
        n = k->tokens.len / 4 / KVD_PAGE_TOKENS;
    }
    if (n > KVD_MAX_PROMPT_BLOCKS)
        return kvd_fail(err, KVD_E_INVALID, "a prompt of %zu blocks; at most %d are possible", n,
                        KVD_MAX_PROMPT_BLOCKS);
    *blocks = (uint32_t)n;
    return KVD_OK;
}

int kvd_prompt_space(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                     const Kvd__V1__PrefixKeys *k, struct kvd_blocks_space *out,
                     struct kvd_error *err)
{
    uint8_t extra[KVD_MAX_PROMPT_EXTRA_BYTES + 4 * KVD_MAX_PROMPT_EXTRAS], digest[32];
    struct kvd_pool_namespace_info info;
    size_t n = 0;
    for (size_t i = 0; i < k->n_extra; i++) {
        for (int b = 0; b < 4; b++)
            extra[n++] = (uint8_t)(k->extra[i].len >> 8 * b);
        if (k->extra[i].len) // else there is no data either
            memcpy(extra + n, k->extra[i].data, k->extra[i].len);
        n += k->extra[i].len;
    }
    *out = (struct kvd_blocks_space){.ns = ns, .layout = layout};
    kvd_layout_digest_bytes(kvd_pool_layout_get(d->pool, layout), digest);
    kvd_pool_namespace_info(d->pool, ns, &info);
    return kvd_prefix_domain_digest(info.name, digest, extra, n, out->domain, err);
}

int kvd_prompt_keys(const struct kvd_blocks_space *space, const Kvd__V1__PrefixKeys *k,
                    uint32_t from, uint32_t to, struct kvd_prefix_key *out, struct kvd_error *err)
{
    const struct kvd_prefix_key *before = from ? &out[from - 1] : NULL;
    if (k->block_keys.len)
        return kvd_prefix_keys_of_blocks(space->domain, before,
                                         k->block_keys.data + (size_t)from * k->key_bytes,
                                         k->key_bytes, to - from, out + from, err);
    return kvd_prefix_keys_of_tokens(space->domain, before,
                                     (const uint32_t *)(const void *)k->tokens.data +
                                         (size_t)from * KVD_PAGE_TOKENS,
                                     to - from, out + from, err);
}

Kvd__V1__MissReason kvd_miss_reason(enum kvd_prefix_reason reason)
{
    static const Kvd__V1__MissReason reasons[KVD_PREFIX_REASONS] = {
        [KVD_PREFIX_UNKNOWN] = KVD__V1__MISS_REASON__MISS_UNKNOWN,
        [KVD_PREFIX_PRESENT] = KVD__V1__MISS_REASON__MISS_NONE,
        [KVD_PREFIX_EVICTED_ROOM] = KVD__V1__MISS_REASON__MISS_EVICTED_ROOM,
        [KVD_PREFIX_EVICTED_QUOTA] = KVD__V1__MISS_REASON__MISS_EVICTED_QUOTA,
        [KVD_PREFIX_EVICTED_INDEX] = KVD__V1__MISS_REASON__MISS_EVICTED_INDEX,
        [KVD_PREFIX_DROPPED] = KVD__V1__MISS_REASON__MISS_DROPPED,
        [KVD_PREFIX_DAMAGED] = KVD__V1__MISS_REASON__MISS_DAMAGED,
        [KVD_PREFIX_EVICTED_ASKED] = KVD__V1__MISS_REASON__MISS_EVICTED_ASKED,
        [KVD_PREFIX_EXPIRED] = KVD__V1__MISS_REASON__MISS_EXPIRED,
        [KVD_PREFIX_SUPERSEDED] = KVD__V1__MISS_REASON__MISS_SUPERSEDED,
    };
    return reasons[reason];
}

Kvd__V1__MissReason kvd_prompt_miss(struct kvd_daemon *d, const struct kvd_blocks_space *space,
                                    const Kvd__V1__PrefixKeys *keys,
                                    const struct kvd_blocks_match *match)
{
    struct kvd_blocks_space other;
    uint32_t looked = 0;
    if (match->known == match->n && match->why != KVD_PREFIX_DAMAGED)
        return KVD__V1__MISS_REASON__MISS_NONE;
    if (match->known || match->why != KVD_PREFIX_UNKNOWN)
        return kvd_miss_reason(match->why);
    for (uint32_t i = 0; i < KVD_POOL_DOMAINS && looked < ELSEWHERE; i++) {
        struct kvd_prefix_key key;
        struct kvd_blocks_match first = {.keys = &key, .n = 1};
        if (!kvd_blocks_space_at(d->pool, space->ns, i, &other))
            continue;
        looked++;
        if (kvd_prompt_keys(&other, keys, 0, 1, &key, NULL))
            continue;
        kvd_blocks_match(d->pool, &other, false, &first);
        if (first.known)
            return other.layout == space->layout ? KVD__V1__MISS_REASON__MISS_OTHER_EXTRA
                                                 : KVD__V1__MISS_REASON__MISS_OTHER_LAYOUT;
    }
    return KVD__V1__MISS_REASON__MISS_UNKNOWN;
}

// Prompts: looking up, adopting and publishing blocks.
#include "client/lib/client.h"

#define METHOD(name) "/kvd.v1.KvCache/" name

// A prompt in wire form, with what the message points to.
struct wire {
    Kvd__V1__PrefixKeys keys;
    ProtobufCBinaryData extras[KVD_MAX_PROMPT_EXTRAS];
};

static int check(const kvd_prompt *p, struct kvd_error *err)
{
    if (!p->block_keys == !p->tokens)
        return kvd_fail(err, KVD_E_INVALID, "block_keys or tokens are wanted, and not both");
    if (p->block_keys && (p->key_bytes < KVD_MIN_BLOCK_KEY || p->key_bytes > KVD_MAX_BLOCK_KEY))
        return kvd_fail(err, KVD_E_INVALID, "key_bytes is %u; %d to %d are possible", p->key_bytes,
                        KVD_MIN_BLOCK_KEY, KVD_MAX_BLOCK_KEY);
    uint32_t blocks = p->tokens ? p->n_tokens / KVD_PAGE_TOKENS : p->blocks;
    if (blocks > KVD_MAX_PROMPT_BLOCKS)
        return kvd_fail(err, KVD_E_INVALID, "%u blocks; at most %d are possible", blocks,
                        KVD_MAX_PROMPT_BLOCKS);
    if (p->n_extras > KVD_MAX_PROMPT_EXTRAS || (p->n_extras && !p->extras))
        return kvd_fail(err, KVD_E_INVALID, "%u extras%s; at most %d are possible", p->n_extras,
                        p->extras ? "" : " and no list of them", KVD_MAX_PROMPT_EXTRAS);
    for (uint32_t i = 0; i < p->n_extras; i++)
        if (p->extras[i].bytes > KVD_MAX_PROMPT_EXTRA_BYTES ||
            (p->extras[i].bytes && !p->extras[i].data))
            return kvd_fail(err, KVD_E_INVALID, "extras[%u] has %llu bytes%s; at most %d", i,
                            (unsigned long long)p->extras[i].bytes,
                            p->extras[i].data ? "" : " and no data", KVD_MAX_PROMPT_EXTRA_BYTES);
    return KVD_OK;
}

static int fill(const kvd_prompt *from, struct wire *to, struct kvd_error *err)
{
    kvd_prompt p;
    int rc = kvd_sized_take(&kvd_sized_prompt, from, &p, err);
    if (rc == KVD_OK)
        rc = check(&p, err);
    if (rc)
        return rc;
    kvd__v1__prefix_keys__init(&to->keys);
    if (p.block_keys) {
        to->keys.key_bytes = p.key_bytes;
        to->keys.block_keys = (ProtobufCBinaryData){(size_t)p.blocks * p.key_bytes,
                                                    (uint8_t *)(uintptr_t)p.block_keys};
    } else {
        _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are sent as they lie");
        to->keys.tokens = (ProtobufCBinaryData){
            (size_t)(p.n_tokens / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS) * sizeof(*p.tokens),
            (uint8_t *)(uintptr_t)p.tokens};
    }
    for (uint32_t i = 0; i < p.n_extras; i++)
        to->extras[i] =
            (ProtobufCBinaryData){p.extras[i].bytes, (uint8_t *)(uintptr_t)p.extras[i].data};
    to->keys.n_extra = p.n_extras;
    to->keys.extra = to->extras;
    return KVD_OK;
}

void kvd_take_behind(char *const *tiers, size_t n_tiers, const uint32_t *behind, size_t n_behind,
                     uint32_t out[KVD_CLIENT_TIERS])
{
    static const char *const names[] = {"host", "directory", "redis"};
    _Static_assert(KVD_LEN(names) == KVD_CLIENT_TIERS, "a name each");
    _Static_assert(KVD_LEN(((kvd_match *)0)->behind) == KVD_CLIENT_TIERS, "a place each");
    for (size_t i = 0; i < n_behind && i < n_tiers; i++)
        for (size_t t = 0; t < KVD_LEN(names); t++)
            if (strcmp(tiers[i], names[t]) == 0)
                out[t] = behind[i];
}

static void give_match(const Kvd__V1__MatchPrefixReply *reply, const Kvd__V1__PrefixMatch *m,
                       kvd_match *out)
{
    kvd_match found = {.blocks = m->blocks,
                       .known = m->known,
                       .window_tokens = m->window_tokens,
                       .end = m->end,
                       .lease = m->lease,
                       .miss = (kvd_miss)m->miss,
                       .missed = m->miss_time,
                       .restored = m->restored};
    kvd_take_behind(reply->tiers, reply->n_tiers, m->behind, m->n_behind, found.behind);
    kvd_sized_give(&kvd_sized_match, &found, out);
}

static const void *behind(const void *first, uint32_t size, uint32_t i)
{
    return (const uint8_t *)first + (size_t)size * i;
}

static int fill_all(const kvd_prompt *prompts, uint32_t count, struct wire *wires,
                    Kvd__V1__PrefixKeys **refs, struct kvd_error *err)
{
    uint32_t step;
    memcpy(&step, prompts, sizeof(step));
    for (uint32_t i = 0; i < count; i++) {
        int rc = fill(behind(prompts, step, i), &wires[i], err);
        if (rc)
            return kvd_fail_in(err, "prompts[%u]", i);
        refs[i] = &wires[i].keys;
    }
    return KVD_OK;
}

kvd_result kvd_prompts_match(kvd_client *c, const kvd_prompt *prompts, uint32_t count,
                             const kvd_match_options *options, kvd_match *out, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "prompts", prompts);
    Kvd__V1__MatchPrefixRequest req = KVD__V1__MATCH_PREFIX_REQUEST__INIT;
    Kvd__V1__MatchPrefixReply *reply = NULL;
    struct kvd_error e = {0};
    kvd_match_options o = KVD_NEW(kvd_match_options);
    uint32_t step;
    if (options && kvd_sized_take(&kvd_sized_match_options, options, &o, &e))
        return kvd_client_fail(err, &e);
    if (count < 1 || count > KVD_MAX_CALL_PROMPTS) {
        kvd_fail(&e, KVD_E_INVALID, "%u prompts; 1 to %d are possible", count,
                 KVD_MAX_CALL_PROMPTS);
        return kvd_client_fail(err, &e);
    }
    struct wire *wires KVD_FREE = calloc(count, sizeof(*wires));
    Kvd__V1__PrefixKeys **refs KVD_FREE = calloc(count, sizeof(*refs));
    if (!wires || !refs)
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
    else if (kvd_sized_check(&kvd_sized_match, out, &e) == KVD_OK)
        fill_all(prompts, count, wires, refs, &e);
    if (e.code)
        return kvd_client_fail(err, &e);
    memcpy(&step, out, sizeof(step));
    req.n_requests = count;
    req.requests = refs;
    req.lease_ms = o.lease_ms;
    req.restore_ms = o.restore_ms;
    req.wait_ms = o.wait_ms;
    req.tiers = o.tiers;
    req.quiet = o.quiet;
    req.recompute_window = o.recompute_window;
    kvd_result rc = kvd_client_call_until(c, METHOD("MatchPrefix"), &req, &req.session,
                                          &kvd__v1__match_prefix_reply__descriptor, &reply,
                                          kvd_client_deadline(c) + o.restore_ms + o.wait_ms, err);
    if (rc)
        return rc;
    if (reply->n_matches != count) {
        kvd_fail(&e, KVD_E_INTERNAL, "asked for %u prompts, heard of %zu", count, reply->n_matches);
        rc = kvd_client_fail(err, &e);
    }
    for (uint32_t i = 0; rc == KVD_SUCCESS && i < count; i++) {
        kvd_match *one = (kvd_match *)(uintptr_t)behind(out, step, i);
        memcpy(one, &step, sizeof(step));
        give_match(reply, reply->matches[i], one);
    }
    kvd__v1__match_prefix_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_prompts_hint(kvd_client *c, const kvd_prompt *prompts, uint32_t count, kvd_hint hint,
                            uint32_t ms, bool expire, uint32_t *blocks, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "prompts", prompts);
    Kvd__V1__HintPrefixRequest req = KVD__V1__HINT_PREFIX_REQUEST__INIT;
    Kvd__V1__HintPrefixReply *reply = NULL;
    struct kvd_error e = {0};
    if (count < 1 || count > KVD_MAX_CALL_PROMPTS) {
        kvd_fail(&e, KVD_E_INVALID, "%u prompts; 1 to %d are possible", count,
                 KVD_MAX_CALL_PROMPTS);
        return kvd_client_fail(err, &e);
    }
    struct wire *wires KVD_FREE = calloc(count, sizeof(*wires));
    Kvd__V1__PrefixKeys **refs KVD_FREE = calloc(count, sizeof(*refs));
    if (!wires || !refs)
        kvd_fail(&e, KVD_E_INTERNAL, "out of memory");
    if (e.code || fill_all(prompts, count, wires, refs, &e))
        return kvd_client_fail(err, &e);
    req.hint = (Kvd__V1__HintPrefixRequest__Hint)hint;
    req.n_requests = count;
    req.requests = refs;
    req.ms = ms;
    req.expire = expire;
    kvd_result rc = kvd_client_call(c, METHOD("HintPrefix"), &req, &req.session,
                                    &kvd__v1__hint_prefix_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->n_blocks != count) {
        kvd_fail(&e, KVD_E_INTERNAL, "told of %u prompts, heard of %zu", count, reply->n_blocks);
        rc = kvd_client_fail(err, &e);
    } else if (blocks) {
        memcpy(blocks, reply->blocks, count * sizeof(*blocks));
    }
    kvd__v1__hint_prefix_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_prompt_adopt(kvd_client *c, uint64_t lease, uint32_t blocks, uint64_t *sequence,
                            uint64_t *length, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "sequence", sequence, "length", length);
    Kvd__V1__AdoptPrefixRequest req = KVD__V1__ADOPT_PREFIX_REQUEST__INIT;
    Kvd__V1__AdoptItem item = KVD__V1__ADOPT_ITEM__INIT, *ref = &item;
    Kvd__V1__AdoptPrefixReply *reply = NULL;
    struct kvd_error e = {0};
    req.request_id = ++c->next_request;
    item.lease = lease;
    item.blocks = blocks;
    req.n_items = 1;
    req.items = &ref;
    kvd_result rc = kvd_client_call(c, METHOD("AdoptPrefix"), &req, &req.session,
                                    &kvd__v1__adopt_prefix_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->n_sequences == 1 && reply->n_lengths == 1) {
        *sequence = reply->sequences[0];
        *length = reply->lengths[0];
    } else {
        kvd_fail(&e, KVD_E_INTERNAL, "asked for a sequence, got %zu", reply->n_sequences);
        rc = kvd_client_fail(err, &e);
    }
    kvd__v1__adopt_prefix_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_leases_release(kvd_client *c, const uint64_t *leases, uint32_t count,
                              kvd_failure *err)
{
    KVD_WANT(err, "client", c, "leases", leases);
    Kvd__V1__ReleasePrefixRequest req = KVD__V1__RELEASE_PREFIX_REQUEST__INIT;
    Kvd__V1__ReleasePrefixReply *reply = NULL;
    struct kvd_error e = {0};
    if (count < 1 || count > KVD_MAX_CALL_SEQUENCES) {
        kvd_fail(&e, KVD_E_INVALID, "%u leases; 1 to %d are possible", count,
                 KVD_MAX_CALL_SEQUENCES);
        return kvd_client_fail(err, &e);
    }
    req.n_leases = count;
    req.leases = (uint64_t *)leases;
    kvd_result rc = kvd_client_call(c, METHOD("ReleasePrefix"), &req, &req.session,
                                    &kvd__v1__release_prefix_reply__descriptor, &reply, err);
    if (rc == KVD_SUCCESS)
        kvd__v1__release_prefix_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_prompt_publish(kvd_client *c, uint64_t sequence, const kvd_prompt *prompt, bool end,
                              kvd_published *out, kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    Kvd__V1__PublishBlocksRequest req = KVD__V1__PUBLISH_BLOCKS_REQUEST__INIT;
    Kvd__V1__PublishItem item = KVD__V1__PUBLISH_ITEM__INIT, *ref = &item;
    Kvd__V1__PublishBlocksReply *reply = NULL;
    struct kvd_error e = {0};
    struct wire wire;
    if (kvd_sized_check(&kvd_sized_published, out, &e) || fill(prompt, &wire, &e))
        return kvd_client_fail(err, &e);
    item.sequence = sequence;
    item.keys = &wire.keys;
    item.end = end;
    req.n_items = 1;
    req.items = &ref;
    kvd_result rc = kvd_client_call(c, METHOD("PublishBlocks"), &req, &req.session,
                                    &kvd__v1__publish_blocks_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->n_items == 1) {
        const kvd_published p = {.blocks = reply->items[0]->blocks,
                                 .known = reply->items[0]->known,
                                 .end = reply->items[0]->end};
        kvd_sized_give(&kvd_sized_published, &p, out);
    } else {
        kvd_fail(&e, KVD_E_INTERNAL, "published one prompt, heard of %zu", reply->n_items);
        rc = kvd_client_fail(err, &e);
    }
    kvd__v1__publish_blocks_reply__free_unpacked(reply, NULL);
    return rc;
}

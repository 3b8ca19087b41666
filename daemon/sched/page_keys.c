// What page calls name: spaces and keys, from the wire to the prefix index; and the page that an
// error names.
#include "daemon/sched/op.h"

enum { ENCODED, EXACT }; // the spaces: a page's kind - 1

int kvd_page_spaces(struct kvd_daemon *d, const struct kvd_session *s,
                    const ProtobufCBinaryData *space, struct kvd_blocks_space out[2],
                    struct kvd_error *err)
{
    const uint32_t layouts[2] = {s->layout, s->exact};
    uint8_t extra[4 + KVD_MAX_PROMPT_EXTRA_BYTES];
    struct kvd_pool_namespace_info info;
    int rc = KVD_OK;
    if (s->exact == KVD_POOL_NONE)
        return kvd_fail(err, KVD_E_PRECONDITION,
                        "the session was opened without page calls; open one with `pages`");
    if (space->len < 1 || space->len > KVD_MAX_PROMPT_EXTRA_BYTES)
        return kvd_fail(err, KVD_E_INVALID, "a space of %zu bytes; 1 to %d are possible",
                        space->len, KVD_MAX_PROMPT_EXTRA_BYTES);
    for (int b = 0; b < 4; b++)
        extra[b] = (uint8_t)(space->len >> 8 * b);
    memcpy(extra + 4, space->data, space->len);
    kvd_pool_namespace_info(d->pool, s->ns, &info);
    for (int i = 0; i < 2 && rc == KVD_OK; i++) {
        out[i] = (struct kvd_blocks_space){.ns = s->ns, .layout = layouts[i]};
        rc = kvd_prefix_domain_digest(info.name, s->digests[i], extra, 4 + space->len,
                                      out[i].domain, err);
    }
    return rc;
}

int kvd_page_count(uint32_t key_bytes, const ProtobufCBinaryData *keys, uint32_t most, uint32_t *n,
                   struct kvd_error *err)
{
    if (key_bytes < KVD_MIN_BLOCK_KEY || key_bytes > KVD_MAX_BLOCK_KEY)
        return kvd_fail(err, KVD_E_INVALID, "keys of %u bytes; %d to %d are possible", key_bytes,
                        KVD_MIN_BLOCK_KEY, KVD_MAX_BLOCK_KEY);
    if (keys->len % key_bytes)
        return kvd_fail(err, KVD_E_INVALID, "%zu bytes are no keys of %u bytes", keys->len,
                        key_bytes);
    if (keys->len / key_bytes > most)
        return kvd_fail(err, KVD_E_INVALID, "%zu pages; at most %u are possible",
                        keys->len / key_bytes, most);
    *n = (uint32_t)(keys->len / key_bytes);
    return KVD_OK;
}

void kvd_page_find(struct kvd_daemon *d, const struct kvd_blocks_space spaces[2],
                   struct kvd_prefix_key *const keys[2], bool use, uint32_t n,
                   uint32_t *const entries[2], uint8_t *kinds)
{
    kvd_page_find_best(d, spaces, keys, use, n, entries, kinds);
    for (uint32_t i = 0; i < n; i++)
        if (kinds[i] == KVD_PAGE_EXACT && entries[ENCODED][i] != KVD_PREFIX_NONE &&
            kvd_blocks_superseded(d->pool, spaces[EXACT].ns, entries[EXACT][i]))
            kinds[i] = KVD_PAGE_ENCODED;
}

void kvd_page_find_best(struct kvd_daemon *d, const struct kvd_blocks_space spaces[2],
                        struct kvd_prefix_key *const keys[2], bool use, uint32_t n,
                        uint32_t *const entries[2], uint8_t *kinds)
{
    for (int i = 0; i < 2; i++)
        kvd_blocks_find_pages(d->pool, &spaces[i], use, keys[i], n, entries[i]);
    for (uint32_t i = 0; i < n; i++)
        kinds[i] = entries[EXACT][i] != KVD_PREFIX_NONE     ? KVD_PAGE_EXACT
                   : entries[ENCODED][i] != KVD_PREFIX_NONE ? KVD_PAGE_ENCODED
                                                            : KVD_PAGE_MISSING;
}

void kvd_op_pages_now(struct kvd_daemon *d, struct kvd_work *w)
{
    uint32_t entries[2][KVD_MAX_CALL_PAGES];
    uint32_t *const lists[2] = {entries[ENCODED], entries[EXACT]};
    const struct kvd_work_pages *p = w->pages;
    kvd_page_find(d, p->spaces, p->keys, false, p->n, lists, p->kinds);
}

void kvd_op_pages_free(struct kvd_daemon *d, struct kvd_work_pages **pages)
{
    struct kvd_work_pages *p = KVD_TAKE(*pages);
    if (!p)
        return;
    kvd_pool_layout_unref(d->pool, p->spaces[EXACT].layout);
    for (int i = 0; i < 2; i++)
        free(p->keys[i]);
    free(p->kinds);
    free(p->first);
    free(p->paged);
    free(p->k_inline);
    free(p->v_inline);
    free(p);
}

int kvd_op_explain_pages(struct kvd_work *w, int rc, const uint32_t *pages)
{
    const struct kvd_nonfinite *n = &w->nonfinite;
    const struct kvd_run *run = kvd_op_run(w);
    if (rc != KVD_E_INVALID)
        return kvd_fail(&w->err, rc, "the pages could not be checked; nothing was stored");
    return kvd_fail(&w->err, KVD_E_INVALID,
                    "%s of page %u holds NaN or Inf at layer %u, token %u, head %u, channel %u; "
                    "nothing was stored",
                    n->in_v ? "v" : "k", pages[n->item] + n->token / KVD_PAGE_TOKENS,
                    run->at + n->layer - run->layer_begin, n->token % KVD_PAGE_TOKENS, n->head,
                    n->channel);
}

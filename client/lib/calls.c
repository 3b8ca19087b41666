// The calls of the public API, each a request filled in and a reply taken apart.
#include "client/lib/client.h"

#define METHOD(name) "/kvd.v1.KvCache/" name

static Kvd__V1__TensorRef tensor(const kvd_tensor_ref *t)
{
    Kvd__V1__TensorRef r = KVD__V1__TENSOR_REF__INIT;
    r.dtype = t->dtype == KVD_F32 ? KVD__V1__DTYPE__DTYPE_F32 : KVD__V1__DTYPE__DTYPE_BF16;
    if (t->buffer && t->buffer->local)
        return r; // it travels with the call
    r.buffer = t->buffer ? t->buffer->id : 0;
    r.offset = t->offset + (t->buffer ? t->buffer->at : 0);
    r.layer_stride = t->layer_stride;
    r.token_stride = t->token_stride;
    r.head_stride = t->head_stride;
    return r;
}

static kvd_result take_ids(kvd_result rc, Kvd__V1__SequencesReply *reply, uint32_t count,
                           uint64_t *ids, kvd_failure *err)
{
    if (rc)
        return rc;
    if (reply->n_sequences == count) {
        memcpy(ids, reply->sequences, count * sizeof(*ids));
    } else {
        struct kvd_error e = {0};
        kvd_fail(&e, KVD_E_INTERNAL, "asked for %u sequences, got %zu", count, reply->n_sequences);
        rc = kvd_client_fail(err, &e);
    }
    kvd__v1__sequences_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_sequences_create(kvd_client *c, uint32_t count, uint64_t *ids, kvd_failure *err)
{
    KVD_WANT(err, "client", c, "ids", ids);
    Kvd__V1__CreateSequencesRequest req = KVD__V1__CREATE_SEQUENCES_REQUEST__INIT;
    Kvd__V1__SequencesReply *reply = NULL;
    req.request_id = ++c->next_request;
    req.count = count;
    kvd_result rc = kvd_client_call(c, METHOD("CreateSequences"), &req, &req.session,
                                    &kvd__v1__sequences_reply__descriptor, &reply, err);
    return take_ids(rc, reply, count, ids, err);
}

kvd_result kvd_sequence_fork(kvd_client *c, uint64_t sequence, uint32_t count, uint64_t *ids,
                             kvd_failure *err)
{
    KVD_WANT(err, "client", c, "ids", ids);
    Kvd__V1__ForkSequenceRequest req = KVD__V1__FORK_SEQUENCE_REQUEST__INIT;
    Kvd__V1__SequencesReply *reply = NULL;
    req.request_id = ++c->next_request;
    req.sequence = sequence;
    req.count = count;
    kvd_result rc = kvd_client_call(c, METHOD("ForkSequence"), &req, &req.session,
                                    &kvd__v1__sequences_reply__descriptor, &reply, err);
    return take_ids(rc, reply, count, ids, err);
}

kvd_result kvd_sequence_truncate(kvd_client *c, uint64_t sequence, uint64_t length,
                                 kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    Kvd__V1__TruncateSequenceRequest req = KVD__V1__TRUNCATE_SEQUENCE_REQUEST__INIT;
    Kvd__V1__TruncateSequenceReply *reply;
    req.sequence = sequence;
    req.length = length;
    kvd_result rc = kvd_client_call(c, METHOD("TruncateSequence"), &req, &req.session,
                                    &kvd__v1__truncate_sequence_reply__descriptor, &reply, err);
    if (rc == KVD_SUCCESS)
        kvd__v1__truncate_sequence_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_sequence_publish(kvd_client *c, uint64_t sequence, const char *name, bool replace,
                                kvd_failure *err)
{
    KVD_WANT(err, "client", c, "name", name);
    Kvd__V1__PublishSequenceRequest req = KVD__V1__PUBLISH_SEQUENCE_REQUEST__INIT;
    Kvd__V1__PublishSequenceReply *reply;
    req.sequence = sequence;
    req.name = (char *)name;
    req.replace = replace;
    kvd_result rc = kvd_client_call(c, METHOD("PublishSequence"), &req, &req.session,
                                    &kvd__v1__publish_sequence_reply__descriptor, &reply, err);
    if (rc == KVD_SUCCESS)
        kvd__v1__publish_sequence_reply__free_unpacked(reply, NULL);
    return rc;
}

static void copy_info(const Kvd__V1__SequenceInfo *in, kvd_sequence_info *out)
{
    kvd_sequence_info info = {.sequence = in->sequence,
                              .length = in->length,
                              .n_planes = (uint32_t)KVD_MIN(in->n_planes, KVD_LEN(out->planes)),
                              .pending_length = in->pending_length,
                              .pending_layers = in->pending_layers,
                              .bytes = in->bytes,
                              .holders = in->holders,
                              .holds = in->holds};
    for (uint32_t p = 0; p < info.n_planes; p++)
        info.planes[p] = (kvd_plane_tokens){.sink = in->planes[p]->sink,
                                            .freed = in->planes[p]->freed,
                                            .history = in->planes[p]->history,
                                            .recent = in->planes[p]->recent};
    snprintf(info.name, sizeof(info.name), "%s", in->name);
    kvd_sized_give(&kvd_sized_sequence_info, &info, out);
}

kvd_result kvd_sequence_attach(kvd_client *c, const char *name, kvd_sequence_info *out,
                               kvd_failure *err)
{
    KVD_WANT(err, "client", c, "name", name);
    Kvd__V1__AttachSequenceRequest req = KVD__V1__ATTACH_SEQUENCE_REQUEST__INIT;
    Kvd__V1__AttachSequenceReply *reply;
    struct kvd_error e = {0};
    if (kvd_sized_check(&kvd_sized_sequence_info, out, &e))
        return kvd_client_fail(err, &e);
    req.request_id = ++c->next_request;
    req.name = (char *)name;
    kvd_result rc = kvd_client_call(c, METHOD("AttachSequence"), &req, &req.session,
                                    &kvd__v1__attach_sequence_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->sequence)
        copy_info(reply->sequence, out);
    kvd__v1__attach_sequence_reply__free_unpacked(reply, NULL);
    return KVD_SUCCESS;
}

kvd_result kvd_sequences_free(kvd_client *c, const uint64_t *ids, uint32_t count, bool unpublish,
                              kvd_failure *err)
{
    KVD_WANT(err, "client", c, "ids", ids);
    Kvd__V1__FreeSequencesRequest req = KVD__V1__FREE_SEQUENCES_REQUEST__INIT;
    Kvd__V1__FreeSequencesReply *reply;
    req.request_id = ++c->next_request;
    req.n_sequences = count;
    req.sequences = (uint64_t *)ids;
    req.unpublish = unpublish;
    kvd_result rc = kvd_client_call(c, METHOD("FreeSequences"), &req, &req.session,
                                    &kvd__v1__free_sequences_reply__descriptor, &reply, err);
    if (rc == KVD_SUCCESS)
        kvd__v1__free_sequences_reply__free_unpacked(reply, NULL);
    return rc;
}

kvd_result kvd_sequence_describe(kvd_client *c, uint64_t sequence, kvd_sequence_info *out,
                                 kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    Kvd__V1__DescribeSequencesRequest req = KVD__V1__DESCRIBE_SEQUENCES_REQUEST__INIT;
    Kvd__V1__DescribeSequencesReply *reply;
    struct kvd_error e = {0};
    if (kvd_sized_check(&kvd_sized_sequence_info, out, &e))
        return kvd_client_fail(err, &e);
    req.n_sequences = 1;
    req.sequences = &sequence;
    kvd_result rc = kvd_client_call(c, METHOD("DescribeSequences"), &req, &req.session,
                                    &kvd__v1__describe_sequences_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (reply->n_sequences == 1)
        copy_info(reply->sequences[0], out);
    kvd__v1__describe_sequences_reply__free_unpacked(reply, NULL);
    return KVD_SUCCESS;
}

// -- work ---------------------------------------------------------------------------------------

// The tensors of one item, in wire form.
struct refs {
    Kvd__V1__TensorRef k, v, q, o, lse;
};

// Items of a request, their tensors, and pointers to them.
struct batch {
    uint32_t count;
    struct refs *refs;
    void *items;
    void **list;
};

static struct kvd_dims dims_of(const kvd_client *c, kvd_layers l, uint32_t tokens, bool q, bool v,
                               kvd_dtype_t dtype)
{
    const struct kvd_layer_shape *g = &c->shapes[l.begin];
    return (struct kvd_dims){.layers = l.count ? l.count : (uint32_t)c->layout.n_layers - l.begin,
                             .tokens = tokens,
                             .heads = q ? g->q_heads : g->kv_heads,
                             .dim = v ? g->dim_v : g->dim_k,
                             .size = dtype == KVD_F32 ? 4 : 2};
}

static int send_inline(const kvd_client *c, kvd_call_kind kind, kvd_layers l, const kvd_item *item,
                       struct refs *r, struct kvd_error *err)
{
    uint32_t n = item->tokens;
    int rc = KVD_OK;
    if (kind != KVD_CALL_ATTEND)
        rc = kvd_inline_send(&item->k, dims_of(c, l, n, false, false, KVD_BF16), &r->k, err);
    if (kind != KVD_CALL_ATTEND && rc == KVD_OK)
        rc = kvd_inline_send(&item->v, dims_of(c, l, n, false, true, KVD_BF16), &r->v, err);
    if (kind != KVD_CALL_APPEND && rc == KVD_OK)
        rc = kvd_inline_send(&item->q, dims_of(c, l, n, true, false, item->q.dtype), &r->q, err);
    return rc;
}

// *b is to be freed in any case.
static int batch_new(struct batch *b, const kvd_client *c, kvd_call_kind kind, kvd_layers l,
                     const kvd_item *items, uint32_t count, size_t item_bytes,
                     struct kvd_error *err)
{
    int rc = KVD_OK;
    uint64_t sum = 0;
    *b = (struct batch){count, calloc(count + 1, sizeof(*b->refs)), calloc(count + 1, item_bytes),
                        calloc(count + 1, sizeof(void *))};
    if (!b->refs || !b->items || !b->list)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < count && rc == KVD_OK; i++) {
        const kvd_item *item = &items[i];
        struct refs *r = &b->refs[i];
        *r = (struct refs){tensor(&item->k), tensor(&item->v), tensor(&item->q), tensor(&item->o),
                           tensor(&item->lse)};
        b->list[i] = (char *)b->items + i * item_bytes;
        if (c->remote)
            rc = send_inline(c, kind, l, item, r, err);
        sum += r->k.inline_data.len + r->v.inline_data.len + r->q.inline_data.len;
    }
    if (rc == KVD_OK && sum > KVD_MAX_MESSAGE - (1 << 20))
        return kvd_fail(err, KVD_E_LIMIT,
                        "over TCP tensors travel with their call, and %llu bytes are too many for "
                        "one: split it",
                        (unsigned long long)sum);
    return rc;
}

static void batch_free(struct batch *b)
{
    for (uint32_t i = 0; b->refs && i < b->count; i++) {
        free(b->refs[i].k.inline_data.data);
        free(b->refs[i].v.inline_data.data);
        free(b->refs[i].q.inline_data.data);
    }
    free(b->refs);
    free(b->items);
    free(b->list);
}

static kvd_result append(kvd_client *c, kvd_layers layers, const kvd_item *items, uint32_t count,
                         Kvd__V1__Fence *wait, Kvd__V1__Fence *signal, uint64_t deadline,
                         kvd_failure *err)
{
    struct batch b KVD_AUTO(batch_free);
    Kvd__V1__AppendRequest req = KVD__V1__APPEND_REQUEST__INIT;
    Kvd__V1__AppendReply *reply;
    struct kvd_error e = {0};
    if (batch_new(&b, c, KVD_CALL_APPEND, layers, items, count, sizeof(Kvd__V1__AppendItem), &e))
        return kvd_client_fail(err, &e);
    Kvd__V1__AppendItem *out = b.items;
    for (uint32_t i = 0; i < count; i++) {
        kvd__v1__append_item__init(&out[i]);
        out[i].sequence = items[i].sequence;
        out[i].position = items[i].position;
        out[i].tokens = items[i].tokens;
        out[i].request_id = items[i].request;
        out[i].k = &b.refs[i].k;
        out[i].v = &b.refs[i].v;
    }
    req.layer_begin = layers.begin;
    req.layer_count = layers.count;
    req.wait = wait;
    req.signal = signal;
    req.n_items = count;
    req.items = (Kvd__V1__AppendItem **)b.list;
    kvd_result rc =
        kvd_client_call_until(c, METHOD("Append"), &req, &req.session,
                              &kvd__v1__append_reply__descriptor, &reply, deadline, err);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < count && i < reply->n_replayed; i++)
        if (items[i].replayed)
            *items[i].replayed = reply->replayed[i];
    kvd__v1__append_reply__free_unpacked(reply, NULL);
    return KVD_SUCCESS;
}

static Kvd__V1__AttentionParams params_of(const kvd_attention *a, const kvd_item *items,
                                          uint32_t count)
{
    Kvd__V1__AttentionParams p = KVD__V1__ATTENTION_PARAMS__INIT;
    p.scale = a->scale;
    p.softcap = a->softcap;
    p.window = a->window;
    for (uint32_t i = 0; i < count; i++)
        p.return_lse |= items[i].lse.buffer != NULL;
    return p;
}

static int receive_inline(const kvd_client *c, kvd_layers l, const kvd_item *item,
                          const Kvd__V1__AttendResult *r, struct kvd_error *err)
{
    struct kvd_dims d = dims_of(c, l, item->tokens, true, true, item->o.dtype);
    int rc = kvd_inline_receive(&item->o, d, &r->o, err);
    d.dim = 1;
    d.size = sizeof(float);
    return rc || !item->lse.buffer ? rc : kvd_inline_receive(&item->lse, d, &r->lse, err);
}

static kvd_result attention_call(kvd_client *c, const char *method, void *req, char **session,
                                 kvd_layers layers, const kvd_item *items, uint32_t count,
                                 uint64_t deadline, kvd_failure *err)
{
    struct kvd_error e = {0};
    Kvd__V1__AttendReply *reply;
    kvd_result rc = kvd_client_call_until(
        c, method, req, session, &kvd__v1__attend_reply__descriptor, &reply, deadline, err);
    if (rc)
        return rc;
    for (uint32_t i = 0; i < count && i < reply->n_results && !e.code; i++) {
        if (items[i].replayed)
            *items[i].replayed = reply->results[i]->replayed;
        if (c->remote)
            receive_inline(c, layers, &items[i], reply->results[i], &e);
    }
    kvd__v1__attend_reply__free_unpacked(reply, NULL);
    return e.code ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

static kvd_result attend(kvd_client *c, kvd_layers layers, const kvd_attention *attention,
                         const kvd_item *items, uint32_t count, Kvd__V1__Fence *wait,
                         Kvd__V1__Fence *signal, uint64_t deadline, kvd_failure *err)
{
    struct batch b KVD_AUTO(batch_free);
    Kvd__V1__AttendRequest req = KVD__V1__ATTEND_REQUEST__INIT;
    Kvd__V1__AttentionParams params = params_of(attention, items, count);
    struct kvd_error e = {0};
    if (batch_new(&b, c, KVD_CALL_ATTEND, layers, items, count, sizeof(Kvd__V1__AttendItem), &e))
        return kvd_client_fail(err, &e);
    Kvd__V1__AttendItem *out = b.items;
    for (uint32_t i = 0; i < count; i++) {
        kvd__v1__attend_item__init(&out[i]);
        out[i].sequence = items[i].sequence;
        out[i].q_len = items[i].tokens;
        out[i].q = &b.refs[i].q;
        out[i].o = &b.refs[i].o;
        out[i].lse = &b.refs[i].lse;
    }
    req.layer_begin = layers.begin;
    req.layer_count = layers.count;
    req.params = &params;
    req.wait = wait;
    req.signal = signal;
    req.n_items = count;
    req.items = (Kvd__V1__AttendItem **)b.list;
    return attention_call(c, METHOD("Attend"), &req, &req.session, layers, items, count, deadline,
                          err);
}

static kvd_result step(kvd_client *c, kvd_layers layers, const kvd_attention *attention,
                       const kvd_item *items, uint32_t count, Kvd__V1__Fence *wait,
                       Kvd__V1__Fence *signal, uint64_t deadline, kvd_failure *err)
{
    struct batch b KVD_AUTO(batch_free);
    Kvd__V1__StepRequest req = KVD__V1__STEP_REQUEST__INIT;
    Kvd__V1__AttentionParams params = params_of(attention, items, count);
    struct kvd_error e = {0};
    if (batch_new(&b, c, KVD_CALL_STEP, layers, items, count, sizeof(Kvd__V1__StepItem), &e))
        return kvd_client_fail(err, &e);
    Kvd__V1__StepItem *out = b.items;
    for (uint32_t i = 0; i < count; i++) {
        kvd__v1__step_item__init(&out[i]);
        out[i].sequence = items[i].sequence;
        out[i].position = items[i].position;
        out[i].tokens = items[i].tokens;
        out[i].request_id = items[i].request;
        out[i].k = &b.refs[i].k;
        out[i].v = &b.refs[i].v;
        out[i].q = &b.refs[i].q;
        out[i].o = &b.refs[i].o;
        out[i].lse = &b.refs[i].lse;
    }
    req.layer_begin = layers.begin;
    req.layer_count = layers.count;
    req.params = &params;
    req.wait = wait;
    req.signal = signal;
    req.n_items = count;
    req.items = (Kvd__V1__StepItem **)b.list;
    return attention_call(c, METHOD("Step"), &req, &req.session, layers, items, count, deadline,
                          err);
}

kvd_result kvd_client_compute(kvd_client *c, kvd_call_kind kind, kvd_layers layers,
                              const kvd_attention *attention, const kvd_item *items, uint32_t count,
                              Kvd__V1__Fence *wait, Kvd__V1__Fence *signal, uint64_t deadline,
                              kvd_failure *err)
{
    if (kind == KVD_CALL_APPEND)
        return append(c, layers, items, count, wait, signal, deadline, err);
    return kind == KVD_CALL_ATTEND
               ? attend(c, layers, attention, items, count, wait, signal, deadline, err)
               : step(c, layers, attention, items, count, wait, signal, deadline, err);
}

void kvd_items_name(kvd_client *c, kvd_call_kind kind, kvd_item *items, uint32_t count)
{
    for (uint32_t i = 0; i < count && kind != KVD_CALL_ATTEND; i++)
        if (!items[i].request)
            items[i].request = kvd_request_new(c);
}

// A call that is made now, of items and parameters as the program has them.
static kvd_result compute_now(kvd_client *c, kvd_call_kind kind, kvd_layers layers,
                              const kvd_attention *attention, const kvd_item *items, uint32_t count,
                              kvd_failure *err)
{
    struct kvd_error e = {0};
    kvd_item *own KVD_FREE = NULL;
    kvd_attention a = {0};
    if (kvd_items_take(items, count, &own, &e) ||
        (attention && kvd_sized_take(&kvd_sized_attention, attention, &a, &e)) ||
        kvd_check_compute(c, kind, layers, &a, own, count, &e))
        return kvd_client_fail(err, &e);
    kvd_items_name(c, kind, own, count);
    return kvd_client_compute(c, kind, layers, &a, own, count, NULL, NULL, kvd_client_deadline(c),
                              err);
}

uint64_t kvd_request_new(kvd_client *c)
{
    return c ? ++c->next_request : 0;
}

kvd_result kvd_append(kvd_client *c, kvd_layers layers, const kvd_item *items, uint32_t count,
                      kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    return compute_now(c, KVD_CALL_APPEND, layers, NULL, items, count, err);
}

kvd_result kvd_attend(kvd_client *c, kvd_layers layers, const kvd_attention *attention,
                      const kvd_item *items, uint32_t count, kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    return compute_now(c, KVD_CALL_ATTEND, layers, attention, items, count, err);
}

kvd_result kvd_step(kvd_client *c, kvd_layers layers, const kvd_attention *attention,
                    const kvd_item *items, uint32_t count, kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    return compute_now(c, KVD_CALL_STEP, layers, attention, items, count, err);
}

kvd_result kvd_rotate(kvd_client *c, kvd_row_kind kind, bool inverse, kvd_layers layers,
                      uint32_t rows, uint32_t heads, const kvd_tensor_ref *x,
                      const kvd_tensor_ref *y, kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    static const Kvd__V1__RotateRequest__Which kinds[] = {
        [KVD_KEYS] = KVD__V1__ROTATE_REQUEST__WHICH__KEYS,
        [KVD_QUERIES] = KVD__V1__ROTATE_REQUEST__WHICH__QUERIES,
        [KVD_VALUES] = KVD__V1__ROTATE_REQUEST__WHICH__VALUES};
    Kvd__V1__RotateRequest req = KVD__V1__ROTATE_REQUEST__INIT;
    Kvd__V1__RotateReply *reply;
    struct kvd_error e = {0};
    if (kvd_check_rotate(c, kind, layers, rows, heads, x, y, &e))
        return kvd_client_fail(err, &e);
    Kvd__V1__TensorRef in = tensor(x), out = tensor(y);
    req.which = kinds[kind];
    req.inverse = inverse;
    req.layer_begin = layers.begin;
    req.layer_count = layers.count;
    req.rows = rows;
    req.heads = heads;
    req.x = &in;
    req.y = &out;
    struct kvd_dims d = dims_of(c, layers, rows, false, kind == KVD_VALUES, x->dtype);
    d.heads = heads;
    if (c->remote && kvd_inline_send(x, d, &in, &e))
        return kvd_client_fail(err, &e);
    kvd_result rc = kvd_client_call(c, METHOD("Rotate"), &req, &req.session,
                                    &kvd__v1__rotate_reply__descriptor, &reply, err);
    free(in.inline_data.data);
    if (rc)
        return rc;
    d.size = y->dtype == KVD_F32 ? 4 : 2;
    if (c->remote)
        kvd_inline_receive(y, d, &reply->y, &e);
    kvd__v1__rotate_reply__free_unpacked(reply, NULL);
    return e.code ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

kvd_result kvd_read_tokens(kvd_client *c, kvd_layers layers, uint64_t sequence, uint64_t begin,
                           uint32_t count, const kvd_tensor_ref *k, const kvd_tensor_ref *v,
                           kvd_failure *err)
{
    KVD_WANT(err, "client", c);
    Kvd__V1__ReadTokensRequest req = KVD__V1__READ_TOKENS_REQUEST__INIT;
    Kvd__V1__ReadTokensReply *reply;
    struct kvd_error e = {0};
    if (kvd_check_read(c, layers, begin, count, k, v, &e))
        return kvd_client_fail(err, &e);
    static const kvd_tensor_ref none;
    Kvd__V1__TensorRef k_ref = tensor(k ? k : &none), v_ref = tensor(v ? v : &none);
    req.sequence = sequence;
    req.begin = begin;
    req.tokens = count;
    req.layer_begin = layers.begin;
    req.layer_count = layers.count;
    req.k = &k_ref;
    req.v = &v_ref;
    kvd_result rc = kvd_client_call(c, METHOD("ReadTokens"), &req, &req.session,
                                    &kvd__v1__read_tokens_reply__descriptor, &reply, err);
    if (rc)
        return rc;
    if (c->remote && k)
        kvd_inline_receive(k, dims_of(c, layers, count, false, false, k->dtype), &reply->k, &e);
    if (c->remote && v && !e.code)
        kvd_inline_receive(v, dims_of(c, layers, count, false, true, v->dtype), &reply->v, &e);
    kvd__v1__read_tokens_reply__free_unpacked(reply, NULL);
    return e.code ? kvd_client_fail(err, &e) : KVD_SUCCESS;
}

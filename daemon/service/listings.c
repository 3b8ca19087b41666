// What is there, for operators: sessions, sequences, the pool's memory, namespaces.
#include "admin.pb-c.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/service/layout.h"
#include "daemon/service/steps.h"
#include "daemon/session/buffer.h"
#include "daemon/session/session.h"

// What replies say of a layout; rows refer to it.
struct described {
    bool made;
    char digest[KVD_DIGEST_TEXT];
    char codecs[KVD_MAX_PLANES][KVD_CODECS_TEXT];
    Kvd__V1__PlaneInfo infos[KVD_MAX_PLANES], *planes[KVD_MAX_PLANES];
    uint32_t n_planes;
};

// By the pool's layouts, each made when it is met first.
struct layouts {
    struct described of[KVD_MAX_LAYOUTS];
};

static struct described *describe(const struct kvd_daemon *d, struct layouts *all, uint32_t layout)
{
    const struct kvd_layout *l = kvd_pool_layout_get(d->pool, layout);
    struct described *t = &all->of[layout];
    if (t->made)
        return t;
    t->made = true;
    t->n_planes = l->n_planes;
    kvd_layout_digest(l, t->digest);
    for (uint32_t i = 0; i < l->n_planes; i++) {
        const struct kvd_plane *p = &l->planes[i];
        Kvd__V1__PlaneInfo *out = t->planes[i] = &t->infos[i];
        kvd__v1__plane_info__init(out);
        out->layers = p->n_layers;
        out->q_heads = p->q_heads;
        out->kv_heads = p->kv_heads;
        out->head_dim_k = p->head_dim_k;
        out->head_dim_v = p->head_dim_v;
        out->codec = (char *)kvd_codecs_name(p->codec, t->codecs[i]);
        out->sink = p->sink;
        out->recent = p->recent;
        out->window = p->window;
        out->latent = p->latent;
    }
    return t;
}

// -- sessions and sequences: tens of thousands of rows ------------------------------------------
//
// They are made in steps (steps.h), as one pass would hold the loop for longer than anybody may
// wait. A row is packed at once: what it refers to may be gone in the next step.

enum {
    AT_ONCE = 64, // rows, or sequences of a session, in a step
    ROW_TAG = 1 << 3 | PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED, // of rows in both replies
    MORE_TAG = 2 << 3 | PROTOBUF_C_WIRE_TYPE_VARINT,         // ListSequencesReply.more
    MAX_VARINT = 10,
};

// A call on its way.
struct listing {
    struct kvd_stepped stepped;
    struct kvd_call *call;
    // Looks at what is next. False: there is nothing, or `err` says what is wrong.
    bool (*next)(struct kvd_daemon *d, struct listing *l);
    struct kvd_error err;
    uint8_t *reply; // so far
    size_t length, capacity;
    struct layouts layouts; // of this step
    uint32_t place;         // of ListSequences: in the pool
    uint32_t rows, limit;
    const char *ns;     // "" for all
    uint64_t *sessions; // of ListSessions: those that there were when it began
    size_t n_sessions, session;
    uint64_t *held; // of that session, whose bytes are being summed; NULL: it is not begun
    size_t n_held, summed;
    uint64_t bytes;
};

// Memory for so many bytes more.
static bool make_room(struct listing *l, size_t n)
{
    if (l->capacity - l->length >= n)
        return true;
    size_t capacity = KVD_MAX(2 * l->capacity, l->length + n + 4096);
    if (kvd_call_reserve(l->call, capacity - l->capacity, &l->err))
        return false;
    uint8_t *reply = realloc(l->reply, capacity);
    if (!reply) {
        kvd_fail(&l->err, KVD_E_INTERNAL, "out of memory");
        return false;
    }
    l->reply = reply;
    l->capacity = capacity;
    return true;
}

static bool add_row(struct listing *l, const ProtobufCMessage *row)
{
    size_t n = protobuf_c_message_get_packed_size(row);
    if (!make_room(l, 1 + MAX_VARINT + n))
        return false;
    l->reply[l->length++] = ROW_TAG;
    size_t left = n;
    for (; left > 127; left >>= 7)
        l->reply[l->length++] = (uint8_t)(left | 128);
    l->reply[l->length++] = (uint8_t)left;
    l->length += protobuf_c_message_pack(row, l->reply + l->length);
    l->rows++;
    return true;
}

static void listing_free(struct kvd_daemon *d, struct listing *l)
{
    kvd_steps_drop(d, &l->stepped);
    free(l->reply);
    free(l->sessions);
    free(l->held);
    free(l);
}

static void listing_step(struct kvd_daemon *d, struct kvd_stepped *s)
{
    struct listing *l = (struct listing *)s;
    struct kvd_call *call = l->call;
    for (uint32_t i = 0; i < KVD_LEN(l->layouts.of); i++)
        l->layouts.of[i].made = false; // another one may have its place by now
    for (uint32_t i = 0; i < AT_ONCE; i++) {
        if (l->next(d, l))
            continue;
        call->on_cancelled = NULL;
        if (l->err.code)
            kvd_call_fail_error(call, &l->err);
        else
            kvd_call_reply_packed(call, l->reply ? l->reply : (const uint8_t *)"", l->length);
        listing_free(d, l);
        return;
    }
}

static void on_cancelled(struct kvd_call *call)
{
    listing_free(call->d, call->work);
    kvd_call_fail(call, KVD_E_UNAVAILABLE, "the call was cancelled");
}

// NULL: the call has been answered.
static struct listing *listing_new(struct kvd_call *call,
                                   bool (*next)(struct kvd_daemon *d, struct listing *l))
{
    struct listing *l = calloc(1, sizeof(*l));
    if (!l) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    l->stepped.step = listing_step;
    l->call = call;
    l->next = next;
    return l;
}

// Those who ask have no session and no namespace: a user's calls take turns with those of others,
// and all of them with the first namespace's.
static void listing_begin(struct listing *l)
{
    struct kvd_call *call = l->call;
    call->work = l;
    call->on_cancelled = on_cancelled;
    kvd_steps_begin(call->d, &l->stepped, 0, (uint64_t)(uintptr_t)call->user);
}

// Sums the bytes of a session's sequences, some at a time. True: they are summed.
static bool sum_held(struct kvd_daemon *d, struct listing *l, struct kvd_session *s)
{
    struct kvd_pool_seq_info info;
    if (!l->held) {
        l->n_held = l->summed = 0;
        l->bytes = 0;
        l->held = malloc((HASH_COUNT(s->held) + (size_t)1) * sizeof(*l->held));
        for (struct kvd_held *h = l->held ? s->held : NULL; h; h = h->hh.next)
            l->held[l->n_held++] = h->seq;
        if (!l->held)
            kvd_fail(&l->err, KVD_E_INTERNAL, "out of memory");
    }
    for (uint32_t i = 0; i < AT_ONCE / 4 && l->summed < l->n_held; i++)
        if (kvd_pool_seq_info(d->pool, l->held[l->summed++], &info) == KVD_OK)
            l->bytes += info.bytes;
    return l->summed == l->n_held;
}

static bool add_session(struct kvd_daemon *d, struct listing *l, struct kvd_session *s)
{
    struct kvd_pool_namespace_info ns;
    Kvd__V1__SessionInfo out = KVD__V1__SESSION_INFO__INIT;
    kvd_pool_namespace_info(d->pool, s->ns, &ns);
    out.id = s->id;
    out.namespace_name = (char *)ns.name;
    out.client_name = s->client_name;
    out.pid = s->pid;
    out.uid = s->uid;
    out.age_ms = kvd_now_ms(d) - s->opened_ms;
    out.idle_ms = kvd_now_ms(d) - s->used_ms;
    out.sequences = HASH_COUNT(s->held);
    out.buffers = HASH_COUNT(s->buffers);
    out.buffer_bytes = s->buffer_bytes;
    out.calls = s->calls;
    out.page_bytes = l->bytes;
    out.generation = s->generation;
    out.waiting = s->parked;
    if (s->layout != KVD_POOL_NONE) { // else it is being opened
        const struct kvd_layout *g = kvd_pool_layout_get(d->pool, s->layout);
        struct described *t = describe(d, &l->layouts, s->layout);
        out.rotation_set = (char *)g->rotation;
        out.layers = g->n_layers;
        out.tp_rank = g->tp_rank;
        out.tp_size = g->tp_size;
        out.layout_digest = t->digest;
        out.n_planes = t->n_planes;
        out.planes = t->planes;
    }
    return add_row(l, &out.base);
}

static bool next_session(struct kvd_daemon *d, struct listing *l)
{
    struct kvd_session *s;
    if (l->session == l->n_sessions)
        return false;
    HASH_FIND(hh, d->sessions, &l->sessions[l->session], sizeof(*l->sessions), s);
    if (s && !sum_held(d, l, s))
        return !l->err.code;
    free(KVD_TAKE(l->held));
    l->session++;
    return !l->err.code && (!s || add_session(d, l, s));
}

void kvd_on_list_sessions(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_daemon *d = call->d;
    struct listing *l = listing_new(call, next_session);
    if (!l)
        return;
    l->sessions = malloc((d->n_sessions + (size_t)1) * sizeof(*l->sessions));
    if (!l->sessions)
        kvd_fail(&l->err, KVD_E_INTERNAL, "out of memory");
    for (struct kvd_session *s = l->sessions ? d->sessions : NULL; s; s = s->hh.next)
        l->sessions[l->n_sessions++] = s->id;
    listing_begin(l);
}

static bool add_sequence(struct kvd_daemon *d, struct listing *l,
                         const struct kvd_pool_seq_info *info, const char *ns)
{
    const struct kvd_layout *layout = kvd_pool_layout_get(d->pool, info->layout);
    struct described *t = describe(d, &l->layouts, info->layout);
    Kvd__V1__SequencePlane planes[KVD_MAX_PLANES], *refs[KVD_MAX_PLANES];
    Kvd__V1__AdminSequence out = KVD__V1__ADMIN_SEQUENCE__INIT;
    out.sequence = info->id;
    out.namespace_name = (char *)ns;
    out.name = (char *)info->name;
    out.length = info->length;
    out.bytes = info->bytes;
    out.holders = info->holders;
    out.layout_digest = t->digest;
    out.n_planes = t->n_planes;
    out.planes = refs;
    for (uint32_t i = 0; i < t->n_planes; i++) {
        const struct kvd_pool_reach *reach = &info->reach[i];
        Kvd__V1__SequencePlane *p = refs[i] = &planes[i];
        kvd__v1__sequence_plane__init(p);
        p->codec = t->codecs[i];
        p->first = reach->first;
        p->history_tokens = kvd_pool_tokens(&layout->planes[i], info->length, reach).history;
        p->bf16_pages = info->pages[i][KVD_POOL_BF16];
        p->codec_pages = info->pages[i][KVD_POOL_CODEC];
    }
    return add_row(l, &out.base);
}

static bool next_sequence(struct kvd_daemon *d, struct listing *l)
{
    struct kvd_pool_seq_info info;
    struct kvd_pool_namespace_info ns;
    if (l->place == kvd_pool_seq_places(d->pool))
        return false;
    if (!kvd_pool_seq_at(d->pool, l->place++, &info))
        return true;
    kvd_pool_namespace_info(d->pool, info.ns, &ns);
    if (*l->ns && strcmp(l->ns, ns.name) != 0)
        return true;
    if (l->rows < l->limit)
        return add_sequence(d, l, &info, ns.name);
    if (make_room(l, 2)) {
        l->reply[l->length++] = MORE_TAG;
        l->reply[l->length++] = true;
    }
    return false;
}

void kvd_on_list_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ListSequencesRequest *req = request;
    if (req->namespace_name[0] &&
        kvd_pool_namespace_find(call->d->pool, req->namespace_name) == KVD_POOL_NONE) {
        kvd_call_fail(call, KVD_E_NOT_FOUND, "there is no namespace '%.64s'", req->namespace_name);
        return;
    }
    struct listing *l = listing_new(call, next_sequence);
    if (!l)
        return;
    l->ns = req->namespace_name;
    l->limit = req->limit ? KVD_MIN(req->limit, 10000u) : 1000;
    listing_begin(l);
}

// -- the pool's memory and namespaces -----------------------------------------------------------

enum { MAX_GROUPS = 1024 };

struct group_list {
    struct kvd_daemon *d;
    struct layouts layouts;
    Kvd__V1__ExtentGroup infos[MAX_GROUPS], *list[MAX_GROUPS];
    size_t n;
};

static bool add_group(void *ctx, const struct kvd_pool_slab_info *info)
{
    struct group_list *l = ctx;
    struct kvd_pool_namespace_info ns;
    if (l->n == KVD_LEN(l->list))
        return false;
    if (info->extents == 0)
        return true;
    kvd_pool_namespace_info(l->d->pool, info->ns, &ns);
    struct described *t = describe(l->d, &l->layouts, info->layout);
    Kvd__V1__ExtentGroup *out = l->list[l->n] = &l->infos[l->n];
    l->n++;
    kvd__v1__extent_group__init(out);
    out->namespace_name = (char *)ns.name;
    out->kind = info->kind == KVD_POOL_BF16 ? "window" : t->codecs[info->plane];
    out->layout_digest = t->digest;
    out->plane = info->plane;
    out->extents = info->extents;
    out->page_bytes = info->page_bytes;
    out->pages_used = info->used;
    out->pages_free = info->free;
    return true;
}

void kvd_on_get_pool(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_pool_info pool;
    struct group_list *l KVD_FREE = calloc(1, sizeof(*l));
    Kvd__V1__GetPoolReply r = KVD__V1__GET_POOL_REPLY__INIT;
    if (!l) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    kvd_pool_info(call->d->pool, &pool);
    r.pool_bytes = pool.bytes;
    r.extent_bytes = pool.extent_bytes;
    r.extents_total = pool.extents;
    r.extents_granted = pool.extents_granted;
    r.extents_made = pool.extents_made;
    r.used_bytes = pool.used;
    r.slack_bytes = pool.slack;
    r.free_bytes = pool.bytes - pool.used - pool.slack;
    r.evictions = pool.evictions;
    r.metadata_bytes = pool.metadata;
    l->d = call->d;
    kvd_pool_slab_each(call->d->pool, add_group, l);
    r.n_groups = l->n;
    r.groups = l->list;
    kvd_call_reply(call, &r);
}

void kvd_on_list_namespaces(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_daemon *d = call->d;
    uint32_t n = kvd_pool_namespace_count(d->pool);
    Kvd__V1__NamespaceInfo *infos KVD_FREE = calloc(n + 1, sizeof(*infos));
    Kvd__V1__NamespaceInfo **list KVD_FREE = calloc(n + 1, sizeof(*list));
    Kvd__V1__ListNamespacesReply r = KVD__V1__LIST_NAMESPACES_REPLY__INIT;
    for (uint32_t i = 0; infos && list && i < n; i++) {
        struct kvd_pool_namespace_info ns;
        kvd_pool_namespace_info(d->pool, i, &ns);
        if (!ns.name[0])
            continue;
        kvd__v1__namespace_info__init(&infos[i]);
        infos[i].name = (char *)ns.name;
        infos[i].quota_bytes = ns.quota;
        infos[i].used_bytes = ns.used;
        infos[i].pages = ns.pages;
        infos[i].sequences = ns.sequences;
        infos[i].sessions = ns.holders;
        list[r.n_namespaces++] = &infos[i];
    }
    r.namespaces = list;
    kvd_call_reply(call, &r);
}

// What is there, for operators: sessions, sequences, the pool's memory, namespaces.
#include "admin.pb-c.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/service/layout.h"
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
    }
    return t;
}

static uint64_t session_bytes(struct kvd_daemon *d, const struct kvd_session *s)
{
    uint64_t sum = 0;
    struct kvd_pool_seq_info info;
    for (struct kvd_held *h = s->held; h; h = h->hh.next)
        if (kvd_pool_seq_info(d->pool, h->seq, &info) == KVD_OK)
            sum += info.bytes;
    return sum;
}

static void fill_session(struct kvd_daemon *d, struct kvd_session *s, struct layouts *layouts,
                         Kvd__V1__SessionInfo *out)
{
    struct kvd_pool_namespace_info ns;
    kvd_pool_namespace_info(d->pool, s->ns, &ns);
    kvd__v1__session_info__init(out);
    out->id = s->id;
    out->namespace_name = (char *)ns.name;
    out->client_name = s->client_name;
    out->pid = s->pid;
    out->uid = s->uid;
    out->age_ms = kvd_now_ms(d) - s->opened_ms;
    out->idle_ms = kvd_now_ms(d) - s->used_ms;
    out->sequences = HASH_COUNT(s->held);
    out->buffers = HASH_COUNT(s->buffers);
    out->buffer_bytes = s->buffer_bytes;
    out->calls = s->calls;
    out->page_bytes = session_bytes(d, s);
    out->generation = s->generation;
    out->waiting = s->parked;
    if (s->layout == KVD_POOL_NONE) // it is being opened
        return;
    const struct kvd_layout *g = kvd_pool_layout_get(d->pool, s->layout);
    struct described *t = describe(d, layouts, s->layout);
    out->rotation_set = (char *)g->rotation;
    out->layers = g->n_layers;
    out->tp_rank = g->tp_rank;
    out->tp_size = g->tp_size;
    out->layout_digest = t->digest;
    out->n_planes = t->n_planes;
    out->planes = t->planes;
}

void kvd_on_list_sessions(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_daemon *d = call->d;
    size_t n = d->n_sessions, i = 0;
    Kvd__V1__SessionInfo *infos KVD_FREE = calloc(n + 1, sizeof(*infos));
    Kvd__V1__SessionInfo **list KVD_FREE = calloc(n + 1, sizeof(*list));
    struct layouts *layouts KVD_FREE = calloc(1, sizeof(*layouts));
    Kvd__V1__ListSessionsReply r = KVD__V1__LIST_SESSIONS_REPLY__INIT;
    if (!infos || !list || !layouts) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    for (struct kvd_session *s = d->sessions; s; s = s->hh.next, i++) {
        fill_session(d, s, layouts, &infos[i]);
        list[i] = &infos[i];
    }
    r.n_sessions = i;
    r.sessions = list;
    kvd_call_reply(call, &r);
}

// A sequence as it is listed, with what it has in each plane.
struct sequence_row {
    Kvd__V1__AdminSequence info;
    Kvd__V1__SequencePlane planes[KVD_MAX_PLANES], *refs[KVD_MAX_PLANES];
};

struct sequence_list {
    struct kvd_daemon *d;
    const char *ns; // "" for all
    struct sequence_row *rows;
    Kvd__V1__AdminSequence **list;
    struct layouts *layouts;
    size_t n, limit;
    bool more;
};

static bool add_sequence(void *ctx, const struct kvd_pool_seq_info *info)
{
    struct sequence_list *l = ctx;
    struct kvd_pool_namespace_info ns;
    kvd_pool_namespace_info(l->d->pool, info->ns, &ns);
    if (*l->ns && strcmp(l->ns, ns.name) != 0)
        return true;
    if (l->n == l->limit) {
        l->more = true;
        return false;
    }
    struct sequence_row *row = &l->rows[l->n];
    Kvd__V1__AdminSequence *out = l->list[l->n++] = &row->info;
    struct described *t = describe(l->d, l->layouts, info->layout);
    const struct kvd_layout *layout = kvd_pool_layout_get(l->d->pool, info->layout);
    kvd__v1__admin_sequence__init(out);
    out->sequence = info->id;
    out->namespace_name = (char *)ns.name;
    out->name = (char *)info->name;
    out->length = info->length;
    out->bytes = info->bytes;
    out->holders = info->holders;
    out->layout_digest = t->digest;
    out->n_planes = t->n_planes;
    out->planes = row->refs;
    for (uint32_t i = 0; i < t->n_planes; i++) {
        const struct kvd_pool_reach *reach = &info->reach[i];
        Kvd__V1__SequencePlane *p = row->refs[i] = &row->planes[i];
        kvd__v1__sequence_plane__init(p);
        p->codec = t->codecs[i];
        p->first = reach->first;
        p->history_tokens = kvd_pool_tokens(&layout->planes[i], info->length, reach).history;
        p->bf16_pages = info->pages[i][KVD_POOL_BF16];
        p->codec_pages = info->pages[i][KVD_POOL_CODEC];
    }
    return true;
}

void kvd_on_list_sequences(struct kvd_call *call, const void *request)
{
    const Kvd__V1__ListSequencesRequest *req = request;
    struct sequence_list l = {.d = call->d, .ns = req->namespace_name};
    l.limit = req->limit ? KVD_MIN(req->limit, 10000u) : 1000;
    struct sequence_row *rows KVD_FREE = calloc(l.limit, sizeof(*rows));
    Kvd__V1__AdminSequence **list KVD_FREE = calloc(l.limit, sizeof(*list));
    struct layouts *layouts KVD_FREE = calloc(1, sizeof(*layouts));
    Kvd__V1__ListSequencesReply r = KVD__V1__LIST_SEQUENCES_REPLY__INIT;
    if (!rows || !list || !layouts) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    l.rows = rows;
    l.list = list;
    l.layouts = layouts;
    kvd_pool_seq_each(call->d->pool, add_sequence, &l);
    r.n_sequences = l.n;
    r.sequences = list;
    r.more = l.more;
    kvd_call_reply(call, &r);
}

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

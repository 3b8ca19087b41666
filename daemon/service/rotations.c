#include "daemon/service/rotations.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "daemon/core/lifecycle.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/downloads.h"
#include "daemon/session/tenants.h"
#include "proto/fdsock.h"

struct fetch {
    struct kvd_download download; // first
    bool downloads;               // it has begun, as the cache has not got the set
    struct kvd_call *call;
    uv_work_t work; // looks at the cache
    struct kvd_daemon *d;
    struct kvd_layout *g; // NULL: no layout is meant
    kvd_rotations_done *done;
    void *ctx;
    struct kvd_rotations_store store;
    char ref[KVD_MAX_NAME * 2 + 2];
    struct kvd_rotset *set;
    enum kvd_store_source source;
    struct kvd_error err;
    uint64_t began_ns;
};

void kvd_rotations_store(const struct kvd_daemon *d, struct kvd_rotations_store *out)
{
    snprintf(out->url, sizeof(out->url), "%s", d->config.store);
    snprintf(out->cache, sizeof(out->cache), "%s", d->config.cache);
    snprintf(out->public_key, sizeof(out->public_key), "%s", d->config.store_public_key);
    out->config = (struct kvd_store_config){.url = out->url,
                                            .cache = out->cache,
                                            .timeout_ms = d->config.store_timeout_ms,
                                            .public_key = out->public_key,
                                            .given_up = &out->given_up,
                                            .retries = 2};
}

static void fetch(struct fetch *f)
{
    if (kvd_store_fetch(&f->store.config, f->ref, NULL, NULL, &f->set, &f->source, &f->err))
        f->set = NULL;
}

static void finish(struct fetch *f)
{
    struct kvd_daemon *d = f->d;
    struct kvd_metrics *m = &d->metrics;
    uint64_t ms = (uv_hrtime() - f->began_ns) / 1000000;
    f->call->on_cancelled = NULL;
    if (f->set) {
        bool remote = f->source == KVD_STORE_REMOTE;
        m->rotations_fetched += remote;
        m->rotations_cached += !remote;
        kvd_info("rotation set ready name=%s digest=%s from=%s ms=%" PRIu64, f->ref, f->set->digest,
                 remote ? "store" : "cache", ms);
        if (f->g)
            snprintf(f->g->rotation, sizeof(f->g->rotation), "%s", f->set->digest);
        f->done(f->ctx, KVD_TAKE(f->set), NULL);
    } else {
        m->rotations_failed++;
        kvd_warning("rotation set not available name=%s error=\"%s\" ms=%" PRIu64, f->ref,
                    f->err.text, ms);
        f->done(f->ctx, NULL, &f->err);
    }
    free(f);
    kvd_daemon_work_end(d);
}

static void download_run(struct kvd_download *w)
{
    fetch((struct fetch *)w);
}

static void download_done(struct kvd_download *w, int status)
{
    struct fetch *f = (struct fetch *)w;
    if (status < 0 && !f->set)
        kvd_fail(&f->err, KVD_E_UNAVAILABLE, "kvd is shutting down");
    finish(f);
}

// What is not in the cache is fetched, once there is room.
static void download(struct fetch *f)
{
    f->downloads = true;
    f->store.config.url = f->store.url;
    f->err = (struct kvd_error){0};
    f->download =
        (struct kvd_download){.run = download_run, .done = download_done, .user = f->call->user};
    kvd_download_begin(f->d, &f->download);
}

static void on_given_up(struct kvd_call *call)
{
    struct fetch *f = call->work;
    atomic_store(&f->store.given_up, true);
    if (!f->downloads || !kvd_download_drop(&f->download))
        return;
    kvd_fail(&f->err, KVD_E_UNAVAILABLE, "the caller has gone");
    finish(f);
}

static void look_work(uv_work_t *work)
{
    fetch(work->data);
}

static void look_done(uv_work_t *work, int status)
{
    struct fetch *f = work->data;
    if (!f->set && !f->store.given_up && f->store.url[0] && f->err.code != KVD_E_CORRUPT) {
        download(f);
        return;
    }
    if (status < 0 && !f->set)
        kvd_fail(&f->err, KVD_E_UNAVAILABLE, "kvd is shutting down");
    finish(f);
}

static void begin(struct kvd_call *call, const char *ref, struct kvd_layout *g,
                  kvd_rotations_done *done, void *ctx)
{
    struct kvd_daemon *d = call->d;
    struct kvd_error err = {0};
    struct fetch *f = calloc(1, sizeof(*f));
    if (!f) {
        kvd_fail(&err, KVD_E_INTERNAL, "out of memory");
        done(ctx, NULL, &err);
        return;
    }
    f->d = d;
    f->call = call;
    f->g = g;
    f->done = done;
    f->ctx = ctx;
    f->began_ns = uv_hrtime();
    kvd_rotations_store(d, &f->store);
    f->store.config.url = ""; // only the cache
    snprintf(f->ref, sizeof(f->ref), "%s", ref);
    f->work.data = f;
    kvd_daemon_work_begin(d);
    call->work = f;
    call->on_cancelled = on_given_up;
    if (kvd_digest_valid(f->ref))
        uv_queue_work(&d->loop, &f->work, look_work, look_done);
    else
        download(f); // what a tag means is asked anew each time
}

void kvd_rotations_get(struct kvd_call *call, struct kvd_layout *g, kvd_rotations_done *done,
                       void *ctx)
{
    if (g->rotation[0] == '\0' || kvd_rotset_built_in(g->rotation))
        done(ctx, NULL, NULL); // made for each plane
    else
        begin(call, g->rotation, g, done, ctx);
}

void kvd_rotations_fetch(struct kvd_call *call, const char *ref, kvd_rotations_done *done,
                         void *ctx)
{
    begin(call, ref, NULL, done, ctx);
}

static bool write_all(int fd, const void *data, uint64_t bytes)
{
    const uint8_t *at = data;
    while (bytes) {
        ssize_t n = write(fd, at, bytes);
        if (n <= 0)
            return false;
        at += n;
        bytes -= (uint64_t)n;
    }
    return true;
}

// The set as a sealed memfd, for workers in direct mode; -1 when there is no memory for that.
static int share(struct kvd_rotation_data *data)
{
    struct kvd_fd_rotations head = {.magic = KVD_FD_MAGIC,
                                    .version = KVD_FD_VERSION,
                                    .n_layers = data->n_layers,
                                    .heads = data->heads,
                                    .dim_k = data->dim_k,
                                    .dim_v = data->dim_v};
    struct kvd_term terms[KVD_TERMS];
    kvd_rotation_terms(data, terms);
    for (uint32_t i = 0; i < KVD_TERMS_TO_ATTEND; i++)
        head.terms |= (uint32_t)(*terms[i].at != NULL) << i;
    uint64_t n = (uint64_t)data->n_layers * data->heads * sizeof(float);
    int fd KVD_CLOSE = memfd_create("kvd-rotations", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    bool good = fd >= 0 && write_all(fd, &head, sizeof(head));
    for (uint32_t i = 0; i < KVD_TERMS_TO_ATTEND && good; i++)
        good = !*terms[i].at || write_all(fd, *terms[i].at, n * terms[i].each);
    if (!good || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL))
        return -1;
    return KVD_TAKE_FD(fd);
}

struct loaded {
    struct kvd_rotation *rotations[KVD_MAX_PLANES];
    int fds[KVD_MAX_PLANES];
};

// What a plane is rotated by: of the set, or built in; nothing for bf16.
static int select_data(const struct kvd_layout *l, uint32_t plane, const struct kvd_rotset *set,
                       struct kvd_rotation_data *data, struct kvd_error *err)
{
    const struct kvd_plane *g = &l->planes[plane];
    *data = (struct kvd_rotation_data){
        .n_layers = g->n_layers, .heads = 1, .dim_k = g->head_dim_k, .dim_v = g->head_dim_v};
    if (!kvd_codecs_rotated(g->codec))
        return KVD_OK;
    if (set)
        return kvd_rotset_select(set, l, plane, data, err);
    // One matrix serves all layers.
    struct kvd_layout one = {
        .n_layers = 1, .n_planes = 1, .layers = {l->layers[0]}, .planes = {*g}};
    struct kvd_rotset *made KVD_AUTO(kvd_rotset_free) =
        kvd_rotset_new(l->rotation, one.layers, 1, g->head_dim_k, g->head_dim_v, err);
    if (!made)
        return err->code;
    one.planes[0].n_layers = 1;
    int rc = kvd_rotset_select(made, &one, 0, data, err);
    if (rc == KVD_OK && g->latent) // a latent is a key first: its rows must not get shorter
        data->scale_v = data->scale_k;
    if (rc == KVD_OK && strcmp(l->rotation, "identity") == 0) {
        // The backend skips the product when there is no matrix.
        free((void *)data->k);
        free((void *)data->v);
        data->k = data->v = NULL;
    }
    return rc;
}

static void unload(struct kvd_daemon *d, struct loaded *l)
{
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
        if (l->rotations[p])
            d->backend->ops->rotation_free(d->backend, &l->rotations[p]);
        if (l->fds[p] >= 0)
            close(l->fds[p]);
        l->fds[p] = -1;
    }
}

// Puts what each plane is rotated by into the backend's memory, and into a descriptor for workers.
static int load(struct kvd_daemon *d, const struct kvd_layout *l, const struct kvd_rotset *set,
                struct loaded *out, struct kvd_error *err)
{
    for (uint32_t p = 0; p < l->n_planes; p++) {
        struct kvd_rotation_data data;
        int rc = select_data(l, p, set, &data, err);
        if (rc && l->n_planes > 1)
            kvd_fail_in(err, "plane %u", p);
        if (rc)
            return rc;
        if (kvd_codec_tc(l->planes[p].codec.k) && !data.k_sigma)
            kvd_warning("codec %s without transforms rotation=%s: all channels of K are coded "
                        "alike, which loses more than a set that kvctl calib fit --codec %s makes",
                        kvd_codec_name(l->planes[p].codec.k), l->rotation,
                        kvd_codec_name(l->planes[p].codec.k));
        out->rotations[p] = d->backend->ops->rotation_new(d->backend, &data, err);
        if (out->rotations[p] && kvd_codecs_rotated(l->planes[p].codec))
            out->fds[p] = share(&data);
        kvd_rotation_data_deinit(&data);
        if (!out->rotations[p])
            return err->code;
    }
    return KVD_OK;
}

static void drop(struct kvd_daemon *d, uint32_t layout)
{
    struct loaded old;
    if (!d->rotations[layout][0])
        return;
    memcpy(old.rotations, d->rotations[layout], sizeof(old.rotations));
    memcpy(old.fds, d->rotation_fds[layout], sizeof(old.fds));
    unload(d, &old);
    memset(d->rotations[layout], 0, sizeof(d->rotations[layout]));
    memset(d->rotation_fds[layout], 0xff, sizeof(d->rotation_fds[layout]));
    d->metrics.rotations_loaded--;
}

int kvd_rotations_bind(struct kvd_daemon *d, const struct kvd_layout *l,
                       const struct kvd_rotset *set, int64_t uid, uint32_t ns, uint32_t *layout,
                       struct kvd_error *err)
{
    uint64_t bytes[KVD_MAX_PLANES][KVD_POOL_KINDS] = {{0}};
    struct loaded new = {0};
    bool recycled;
    memset(new.fds, 0xff, sizeof(new.fds)); // -1 each
    for (uint32_t p = 0; p < l->n_planes; p++) {
        bytes[p][KVD_POOL_BF16] = kvd_page_bytes(&l->planes[p], kvd_window_codec());
        bytes[p][KVD_POOL_CODEC] = kvd_page_bytes(&l->planes[p], l->planes[p].codec);
    }
    // The rotations first: a layout that they do not fit must leave nothing behind.
    uint32_t there = kvd_pool_layout_find(d->pool, l); // without, if an earlier kvd has left it
    bool known = there != KVD_POOL_NONE && d->rotations[there][0];
    int rc = known ? KVD_OK : load(d, l, set, &new, err);
    if (rc == KVD_OK)
        rc = kvd_layout_open(d, uid, ns, l, bytes, layout, &recycled, err);
    if (rc) {
        unload(d, &new);
        return rc;
    }
    if (recycled)
        drop(d, *layout);
    if (!known) {
        memcpy(d->rotations[*layout], new.rotations, sizeof(new.rotations));
        memcpy(d->rotation_fds[*layout], new.fds, sizeof(new.fds));
        d->metrics.rotations_loaded++;
    }
    return KVD_OK;
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    memset(d->rotation_fds, 0xff, sizeof(d->rotation_fds));    // -1 each
    if (d->config.store[0] && kvd_store_away(d->config.store)) // it may still be mounted
        kvd_warning(
            "the store %s is not there: rotation sets are found in the cache alone until it is",
            d->config.store);
    return KVD_OK;
}

static void stop(struct kvd_daemon *d)
{
    (void)d;
    kvd_store_abort();
}

static void deinit(struct kvd_daemon *d)
{
    for (uint32_t i = 0; i < KVD_MAX_LAYOUTS; i++)
        drop(d, i);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_metrics *m = &d->metrics;
    kvd_metric_head(f, "kvd_rotation_set_requests_total", "counter",
                    "Rotation sets asked for, by where they came from.");
    fprintf(f, "kvd_rotation_set_requests_total{source=\"cache\"} %" PRIu64 "\n",
            m->rotations_cached);
    fprintf(f, "kvd_rotation_set_requests_total{source=\"store\"} %" PRIu64 "\n",
            m->rotations_fetched);
    fprintf(f, "kvd_rotation_set_requests_total{source=\"failed\"} %" PRIu64 "\n",
            m->rotations_failed);
    kvd_metric(f, "kvd_rotation_sets_loaded", "gauge",
               "Rotation sets in the backend's memory, one per layout.",
               (double)m->rotations_loaded);
}

const struct kvd_part kvd_part_rotations = {
    .init = init, .stop = stop, .deinit = deinit, .metrics = metrics};

// The CPU backend's ops table: rotation sets, read-out and rotation of rows.
#include "kernels/cpu/cpu.h"

#include <sched.h>

static struct kvd_cpu *cpu_of(struct kvd_backend *b)
{
    return (struct kvd_cpu *)b;
}

void kvd_load_row(const struct kvd_tensor *t, uint32_t layer, uint64_t token, uint32_t head,
                  uint32_t dim, float *x)
{
    const uint8_t *p = kvd_at(t, layer, token, head);
    if (t->dtype == KVD_DTYPE_F32) {
        memcpy(x, p, dim * sizeof(float));
        return;
    }
    for (uint32_t c = 0; c < dim; c++) {
        uint16_t b;
        memcpy(&b, p + 2 * c, sizeof(b));
        x[c] = kvd_bf16_to_f32(b);
    }
}

void kvd_store_row(const struct kvd_tensor *t, uint32_t layer, uint64_t token, uint32_t head,
                   uint32_t dim, const float *x)
{
    uint8_t *p = kvd_at(t, layer, token, head);
    if (t->dtype == KVD_DTYPE_F32) {
        memcpy(p, x, dim * sizeof(float));
        return;
    }
    for (uint32_t c = 0; c < dim; c++) {
        uint16_t b = kvd_f32_to_bf16(x[c]);
        memcpy(p + 2 * c, &b, sizeof(b));
    }
}

static float *copy_floats(const float *from, uint64_t n, bool *failed)
{
    if (!from)
        return NULL;
    float *to = malloc(n * sizeof(float));
    if (to)
        memcpy(to, from, n * sizeof(float));
    else
        *failed = true;
    return to;
}

static float *transposed(const float *from, uint64_t matrices, uint32_t dim, bool *failed)
{
    if (!from)
        return NULL;
    float *to = malloc(matrices * dim * dim * sizeof(float));
    if (!to) {
        *failed = true;
        return NULL;
    }
    for (uint64_t m = 0; m < matrices; m++)
        for (uint32_t i = 0; i < dim; i++)
            for (uint32_t j = 0; j < dim; j++)
                to[(m * dim + j) * dim + i] = from[(m * dim + i) * dim + j];
    return to;
}

static float *inverted(const float *a, const float *inverse, uint64_t matrices, uint32_t dim,
                       bool *failed)
{
    return inverse ? copy_floats(inverse, matrices * dim * dim, failed)
                   : transposed(a, matrices, dim, failed);
}

static void rotation_free(struct kvd_backend *b, struct kvd_rotation **rp)
{
    (void)b;
    struct kvd_rotation *r = KVD_TAKE(*rp);
    if (!r)
        return;
    free(r->k);
    free(r->k_back);
    if (r->q != r->k)
        free(r->q);
    if (r->q_back != r->k_back)
        free(r->q_back);
    if (r->q_v != r->v)
        free(r->q_v);
    free(r->v);
    free(r->v_back);
    free(r->k_mean);
    free(r->v_mean);
    free(r->k_sigma);
    free(r->k_bits);
    free(r->clip_k);
    free(r->clip_v);
    free(r->gain_k);
    free(r->gain_v);
    free(r);
}

static struct kvd_rotation *rotation_new(struct kvd_backend *b, const struct kvd_rotation_data *d,
                                         struct kvd_error *err)
{
    struct kvd_rotation *r = calloc(1, sizeof(*r));
    if (!r) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
        return NULL;
    }
    uint64_t n = (uint64_t)d->n_layers * d->heads;
    bool failed = false;
    *r = (struct kvd_rotation){.n_layers = d->n_layers,
                               .heads = d->heads,
                               .dim_k = d->dim_k,
                               .dim_v = d->dim_v,
                               .scale_k = d->scale_k,
                               .scale_v = d->scale_v};
    r->k = copy_floats(d->k, n * d->dim_k * d->dim_k, &failed);
    r->v = copy_floats(d->v, n * d->dim_v * d->dim_v, &failed);
    r->k_back = inverted(d->k, d->k_inverse, n, d->dim_k, &failed);
    r->v_back = inverted(d->v, d->v_inverse, n, d->dim_v, &failed);
    r->q = d->k_inverse ? transposed(r->k_back, n, d->dim_k, &failed) : r->k;
    r->q_back = d->k_inverse ? transposed(r->k, n, d->dim_k, &failed) : r->k_back;
    r->q_v = d->v_inverse ? transposed(r->v_back, n, d->dim_v, &failed) : r->v;
    r->k_mean = copy_floats(d->k_mean, n * d->dim_k, &failed);
    r->v_mean = copy_floats(d->v_mean, n * d->dim_v, &failed);
    r->k_sigma = copy_floats(d->k_sigma, n * d->dim_k, &failed);
    r->k_bits = copy_floats(d->k_bits, n * (d->dim_k / KVD_TC_TILE), &failed);
    r->clip_k = copy_floats(d->clip_k, n, &failed);
    r->clip_v = copy_floats(d->clip_v, n, &failed);
    r->gain_k = copy_floats(d->gain_k, n, &failed);
    r->gain_v = copy_floats(d->gain_v, n, &failed);
    if (failed) {
        rotation_free(b, &r);
        kvd_fail(err, KVD_E_INTERNAL, "out of memory for a rotation set");
    }
    return r;
}

struct rotate_job {
    struct kvd_cpu *cpu;
    const struct kvd_rotate_params *p;
};

// One (layer, row): all its heads.
static void rotate_one(void *ctx, uint64_t i)
{
    const struct rotate_job *job = ctx;
    const struct kvd_rotate_params *p = job->p;
    const struct kvd_rotation *r = p->rotation;
    bool v = p->which == KVD_ROTATE_VALUES, means = p->which != KVD_ROTATE_QUERIES;
    uint32_t dim = v ? r->dim_v : r->dim_k;
    const float *const matrices[KVD_ROTATE_COUNT][2] = {[KVD_ROTATE_KEYS] = {r->k, r->k_back},
                                                        [KVD_ROTATE_QUERIES] = {r->q, r->q_back},
                                                        [KVD_ROTATE_VALUES] = {r->v, r->v_back}};
    const float *m = matrices[p->which][p->inverse];
    uint32_t layer = (uint32_t)(i / p->rows);
    uint64_t row = i % p->rows;
    float x[KVD_MAX_ROW], y[KVD_MAX_ROW];
    for (uint32_t h = 0; h < p->heads; h++) {
        kvd_load_row(&p->x, layer, row, h, dim, x);
        uint32_t kv_head = h / (p->heads / p->kv_heads);
        const float *mean = means ? kvd_mean_of(r, v, p->layer_begin + layer, kv_head) : NULL;
        if (!p->inverse)
            kvd_add_mean(mean, -1, 1, dim, x);
        kvd_apply(job->cpu->isa, x, 1, dim,
                  kvd_rotation_of(r, m, dim, p->layer_begin + layer, kv_head), y);
        if (p->inverse)
            kvd_add_mean(mean, 1, 1, dim, y);
        kvd_store_row(&p->y, layer, row, h, dim, y);
    }
}

int kvd_cpu_rotate(struct kvd_backend *b, const struct kvd_rotate_params *p, struct kvd_error *err)
{
    (void)err;
    struct rotate_job job = {cpu_of(b), p};
    kvd_threads_run_slice(job.cpu->threads, p->slice, (uint64_t)p->layer_count * p->rows,
                          rotate_one, &job);
    return KVD_OK;
}

struct read_job {
    struct kvd_cpu *cpu;
    const struct kvd_read_params *p;
};

// One side (K or V) of one token and head, un-rotated.
static void read_row(const struct read_job *job, uint32_t layer, uint64_t token, uint32_t head,
                     bool v, float *x)
{
    const struct kvd_read_params *p = job->p;
    const struct kvd_plane *g = p->plane;
    uint32_t dk = g->head_dim_k, dv = g->head_dim_v, dim = v ? dv : dk;
    struct kvd_codecs codec = kvd_window_codec();
    uint32_t row;
    uint64_t page;
    if (token >= g->sink && token < p->hist_end) {
        codec = g->codec;
        page = p->pages.codec[(token - g->sink) / KVD_PAGE_TOKENS];
        row = (uint32_t)((token - g->sink) % KVD_PAGE_TOKENS);
    } else if (token < g->sink) {
        page = p->pages.bf16[token / KVD_PAGE_TOKENS];
        row = (uint32_t)(token % KVD_PAGE_TOKENS);
    } else {
        uint32_t entry;
        kvd_ring_place(g, token, &entry, &row);
        page = p->pages.bf16[entry];
    }
    uint8_t *tile = (uint8_t *)(uintptr_t)page + kvd_tile_offset(g, codec, layer, head);
    if (kvd_codecs_side(codec, v) == KVD_CODEC_BF16) {
        struct kvd_tensor t = {.data = tile + kvd_codes_offset(codec, dk, v),
                               .token_stride = 2 * dim};
        kvd_load_row(&t, 0, row, 0, dim, x);
        return;
    }
    float rotated[KVD_MAX_ROW];
    const struct kvd_rotation *r = p->rotation;
    struct kvd_tc_coder tc = kvd_tc_coder_at(r, kvd_codecs_side(codec, v), v, layer, head);
    kvd_row_unpack(codec, tile, dk, dv, v, &tc, row, rotated);
    kvd_apply(job->cpu->isa, rotated, 1, dim,
              kvd_rotation_of(r, v ? r->v_back : r->k_back, dim, layer, head), x);
    kvd_add_mean(kvd_mean_of(r, v, layer, head), 1, 1, dim, x);
}

// One (layer, token): all its heads.
static void read_one(void *ctx, uint64_t i)
{
    const struct read_job *job = ctx;
    const struct kvd_read_params *p = job->p;
    uint32_t layer = (uint32_t)(i / p->tokens);
    uint64_t token = i % p->tokens;
    float x[KVD_MAX_ROW];
    for (uint32_t h = 0; h < p->plane->kv_heads; h++) {
        for (int v = 0; v < 2; v++) {
            const struct kvd_tensor *t = v ? &p->v : &p->k;
            if (!t->data)
                continue;
            read_row(job, p->layer_begin + layer, p->begin + token, h, v, x);
            kvd_store_row(t, layer, token, h, v ? p->plane->head_dim_v : p->plane->head_dim_k, x);
        }
    }
}

int kvd_cpu_read(struct kvd_backend *b, const struct kvd_read_params *p, struct kvd_error *err)
{
    (void)err;
    struct read_job job = {cpu_of(b), p};
    kvd_threads_run_slice(job.cpu->threads, p->slice, (uint64_t)p->layer_count * p->tokens,
                          read_one, &job);
    return KVD_OK;
}

static int copy(struct kvd_backend *b, const struct kvd_copy *copies, uint32_t n,
                struct kvd_error *err)
{
    (void)b;
    (void)err;
    for (uint32_t i = 0; i < n; i++)
        for (uint64_t j = 0; j < KVD_MAX(copies[i].pieces, 1u); j++)
            memcpy((void *)(uintptr_t)(copies[i].to + j * copies[i].to_stride),
                   (const void *)(uintptr_t)(copies[i].from + j * copies[i].from_stride),
                   copies[i].bytes);
    return KVD_OK;
}

static int copy_begin(struct kvd_backend *b, const struct kvd_copy *copies, uint32_t n,
                      uint32_t which, struct kvd_error *err)
{
    (void)which;
    return copy(b, copies, n, err);
}

static int copy_end(struct kvd_backend *b, uint32_t which, struct kvd_error *err)
{
    (void)b;
    (void)which;
    (void)err;
    return KVD_OK;
}

static void cpu_free(struct kvd_backend *b)
{
    struct kvd_cpu *cpu = cpu_of(b);
    kvd_threads_free(&cpu->threads);
    free(cpu->walks);
    free(cpu->latent_walks);
    free(cpu->dense);
    free(cpu);
}

static const char *device(const struct kvd_backend *b)
{
    return ((const struct kvd_cpu *)b)->device;
}

static const struct kvd_backend_ops cpu_ops = {
    .name = "cpu",
    .free = cpu_free,
    .device = device,
    .arena_new = kvd_cpu_arena_new,
    .arena_free = kvd_cpu_arena_free,
    .extent_make = kvd_cpu_extent_make,
    .extent_drop = kvd_cpu_extent_drop,
    .extent_zero = kvd_cpu_extent_zero,
    .extent_export = kvd_cpu_extent_export,
    .extent_import = kvd_cpu_extent_import,
    .extent_descriptor = kvd_cpu_extent_descriptor,
    .extent_adopt = kvd_cpu_extent_adopt,
    .foreign_map = kvd_cpu_foreign_map,
    .segments_reserve = kvd_cpu_segments_reserve,
    .memory_free = kvd_cpu_memory_free,
    .rotation_new = rotation_new,
    .rotation_free = rotation_free,
    .check = kvd_cpu_check,
    .append = kvd_cpu_append,
    .attend = kvd_cpu_attend,
    .read = kvd_cpu_read,
    .rotate = kvd_cpu_rotate,
    .copy = copy,
    .copy_begin = copy_begin,
    .copy_end = copy_end,
    .dense = kvd_cpu_dense,
    .paged = kvd_cpu_paged,
    .dense_most = KVD_CPU_DENSE_MOST,
};

static const struct kvd_cpu_isa *choose_isa(const char *name, struct kvd_error *err)
{
    static const struct kvd_cpu_isa *const known[] = {
#ifdef KVD_X86
        &kvd_cpu_amx,    &kvd_cpu_vnni, &kvd_cpu_avx512, &kvd_cpu_avx2,
#endif
        &kvd_cpu_scalar,
    };
    for (size_t i = 0; i < KVD_LEN(known); i++) {
        if (name && strcmp(name, known[i]->name) != 0)
            continue;
        if (known[i]->supported())
            return known[i];
        if (name) {
            kvd_fail(err, KVD_E_UNSUPPORTED, "this CPU has no %s", name);
            return NULL;
        }
    }
    kvd_fail(err, KVD_E_INVALID,
             "unknown instruction set %s; scalar, avx2, avx512, vnni and amx are known", name);
    return NULL;
}

int kvd_cpu_isa_check(const char *isa, struct kvd_error *err)
{
    struct kvd_error why = {0};
    if (choose_isa(isa, &why))
        return KVD_OK;
    return kvd_fail(err, why.code, "%s", why.text);
}

struct kvd_backend *kvd_cpu_backend_new(uint32_t threads, const char *isa, struct kvd_error *err)
{
    const struct kvd_cpu_isa *chosen = choose_isa(isa, err);
    if (!chosen)
        return NULL;
    if (threads == 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        threads = sched_getaffinity(0, sizeof(set), &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
    }
    struct kvd_cpu *cpu = calloc(1, sizeof(*cpu));
    if (!cpu || !(cpu->threads = kvd_threads_new(threads))) {
        free(cpu);
        kvd_fail(err, KVD_E_INTERNAL, "cannot start %u threads", threads);
        return NULL;
    }
    cpu->base.ops = &cpu_ops;
    cpu->isa = chosen;
    snprintf(cpu->device, sizeof(cpu->device), "%u CPU threads, %s", threads, chosen->name);
    return &cpu->base;
}

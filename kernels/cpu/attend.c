// Attention on the CPU, in the flash style: one pass over the tokens with a running maximum. This
// is what all its kinds share (walk.h): units, splits, runs and slices.
//
// A thread that walks over a unit's tokens stops after any 64 of them when its slice is over: the
// walk is kept, and the next slice begins with those that are kept.
#include "kernels/cpu/walk.h"

#include <math.h>

static uint64_t total_tokens(const struct kvd_attend_item *item)
{
    return item->length + item->new_tokens;
}

// The tokens of a page from `row` on, which is 0 where the tile has codes: splits start at tile
// boundaries.
static void page_run(const struct kvd_cpu_walk *w, uint64_t page, struct kvd_codecs codec,
                     uint32_t row, struct kvd_cpu_run *run)
{
    const struct kvd_plane *g = w->job->p->plane;
    run->tile = (const uint8_t *)(uintptr_t)page +
                kvd_tile_offset(g, codec, w->job->p->layer_begin + w->unit.layer, w->unit.head);
    run->k_stride = 2 * g->head_dim_k;
    run->v_stride = 2 * g->head_dim_v;
    if (codec.k == KVD_CODEC_BF16)
        run->k = run->tile + row * run->k_stride;
    if (codec.v == KVD_CODEC_BF16)
        run->v = run->tile + kvd_codes_offset(codec, g->head_dim_k, true) + row * run->v_stride;
    run->n = KVD_PAGE_TOKENS - row;
}

// The run that starts at position t, cut at `end`.
static struct kvd_cpu_run run_at(const struct kvd_cpu_walk *w, uint64_t t, uint64_t end)
{
    const struct kvd_plane *g = w->job->p->plane;
    const struct kvd_attend_item *item = w->unit.item;
    struct kvd_cpu_run run = {.begin = t};
    uint64_t limit = end;
    if (t >= item->length) {
        run.k = kvd_at(&item->k, w->unit.layer, t - item->length, w->unit.head);
        run.v = kvd_at(&item->v, w->unit.layer, t - item->length, w->unit.head);
        run.k_stride = item->k.token_stride;
        run.v_stride = item->v.token_stride;
        run.n = KVD_PAGE_TOKENS;
    } else if (t >= g->sink && t < item->hist_end) {
        uint64_t page = item->pages.codec[(t - g->sink) / KVD_PAGE_TOKENS];
        uint32_t row = (uint32_t)((t - g->sink) % KVD_PAGE_TOKENS);
        limit = KVD_MIN(end, item->hist_end);
        page_run(w, page, g->codec, row, &run);
    } else {
        uint32_t entry = (uint32_t)(t / KVD_PAGE_TOKENS), row = (uint32_t)(t % KVD_PAGE_TOKENS);
        limit = KVD_MIN(end, t < g->sink ? KVD_MIN(item->length, g->sink) : item->length);
        if (t >= g->sink)
            kvd_ring_place(g, t, &entry, &row);
        page_run(w, item->pages.bf16[entry], kvd_window_codec(), row, &run);
    }
    run.n = (uint32_t)KVD_MIN((uint64_t)run.n, limit - t);
    return run;
}

void kvd_cpu_params(const struct kvd_plane *g, const struct kvd_cpu_run *run, bool v,
                    struct kvd_affine param[KVD_PAGE_TOKENS])
{
    uint32_t codec = kvd_codecs_side(g->codec, v);
    float centre = kvd_cpu_centre(codec);
    kvd_params_read(codec, run->tile + kvd_params_offset(g->codec, g->head_dim_k, g->head_dim_v, v),
                    run->n, param);
    for (uint32_t t = 0; t < run->n; t++)
        param[t].min += centre * param[t].scale;
}

// The first token that a row sees; later rows see none before it.
static uint64_t first_visible(const struct kvd_attend_job *job, const struct kvd_cpu_unit *u,
                              uint32_t row)
{
    uint64_t pos = total_tokens(u->item) - u->item->q_len + row / kvd_job_group(job);
    uint32_t window = job->p->window;
    return window && pos + 1 > window ? pos + 1 - window : 0;
}

void kvd_cpu_visible(const struct kvd_cpu_walk *w, const struct kvd_cpu_run *run, uint32_t row,
                     uint32_t *lo, uint32_t *hi)
{
    const struct kvd_attend_item *item = w->unit.item;
    uint32_t r = w->unit.row0 + row;
    uint64_t pos = total_tokens(item) - item->q_len + r / kvd_job_group(w->job);
    uint64_t first = first_visible(w->job, &w->unit, r);
    *lo = first > run->begin ? (uint32_t)KVD_MIN(first - run->begin, (uint64_t)run->n) : 0;
    *hi = pos < run->begin ? 0 : (uint32_t)KVD_MIN(pos - run->begin + 1, (uint64_t)run->n);
}

double kvd_cpu_add_sink(float sink, double *m, double *l)
{
    if (sink == -INFINITY)
        return 1;
    double top = fmax(*m, (double)sink), kept = exp(*m - top);
    *l = *l * kept + exp(sink - top);
    *m = top;
    return kept;
}

// The tokens [begin, end) that may be visible to the unit's rows and belong to a split.
static void split_range(const struct kvd_attend_job *job, const struct kvd_cpu_unit *u,
                        uint32_t split, uint64_t *begin, uint64_t *end)
{
    uint32_t group = kvd_job_group(job), sink = job->p->plane->sink;
    uint64_t total = total_tokens(u->item);
    uint64_t last = total - u->item->q_len + (u->row0 + u->rows - 1) / group;
    uint64_t hi = last + 1;
    uint64_t lo = first_visible(job, u, u->row0);
    // Boundaries at sink + a multiple of a page, as history tiles cannot be entered in the middle.
    // A history of which no row sees anything is not gone back to: its last page may be gone.
    uint64_t seen = lo;
    if (lo > 0)
        lo = lo <= sink ? 0 : sink + (lo - sink) / KVD_PAGE_TOKENS * KVD_PAGE_TOKENS;
    if (seen >= u->item->hist_end)
        lo = KVD_MAX(lo, u->item->hist_end);
    uint64_t pages = kvd_div_up(hi - KVD_MIN(lo, hi), KVD_PAGE_TOKENS);
    uint64_t from = pages * split / job->splits * KVD_PAGE_TOKENS;
    uint64_t to = pages * (split + 1) / job->splits * KVD_PAGE_TOKENS;
    uint64_t base = lo > 0 ? lo : sink % KVD_PAGE_TOKENS; // keeps lo + k * 64 on the grid
    *begin = split == 0 ? lo : KVD_MIN(base + from, hi);
    *end = split + 1 == job->splits ? hi : KVD_MIN(base + to, hi);
}

static struct kvd_cpu_unit unit_at(const struct kvd_attend_job *job, uint64_t i)
{
    const struct kvd_plane *g = job->p->plane;
    uint32_t lo = 0, hi = job->p->n_items;
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if (job->first_unit[mid] <= i)
            lo = mid;
        else
            hi = mid;
    }
    const struct kvd_attend_item *item = &job->p->items[lo];
    uint32_t most = job->kernel->rows, rows = item->q_len * kvd_job_group(job);
    uint32_t blocks = (rows + most - 1) / most;
    i -= job->first_unit[lo];
    struct kvd_cpu_unit u = {.item = item, .row0 = (uint32_t)(i % blocks) * most};
    u.rows = KVD_MIN(most, rows - u.row0);
    i /= blocks;
    u.head = (uint32_t)(i % g->kv_heads);
    u.layer = (uint32_t)(i / g->kv_heads);
    return u;
}

// What a walk refers to outside of itself, which differs from slice to slice.
static void attach(struct kvd_cpu_walk *w, const struct kvd_attend_job *job)
{
    const struct kvd_cpu_kernel *k = job->kernel;
    w->job = job;
    w->out =
        job->partials ? job->partials + w->index * k->partial_bytes : (uint8_t *)w + k->partial_at;
}

static void begin_walk(struct kvd_cpu_walk *w, const struct kvd_attend_job *job, uint64_t index)
{
    w->index = index;
    w->unit = unit_at(job, index / job->splits);
    attach(w, job);
    job->kernel->begin(w);
    split_range(job, &w->unit, (uint32_t)(index % job->splits), &w->at, &w->end);
    w->active = true;
}

// What is to be asked for before a run's turn.
static void look_ahead(struct kvd_cpu_walk *w, const struct kvd_cpu_run *run)
{
    const struct kvd_plane *g = w->job->p->plane;
    w->ahead_rows = run->k ? run->k : run->v;
    if (!run->tile || w->ahead_rows)
        return;
    uint64_t bytes = kvd_tile_bytes(g->codec, g->head_dim_k, g->head_dim_v);
    w->ahead.at = run->tile;
    w->ahead.lines = kvd_div_up(bytes, KVD_WALK_ALIGN);
    w->ahead.step = kvd_div_up(w->ahead.lines, 2 * KVD_LOOP_ASKS + 1);
}

// False: the slice was over first.
static bool walk_on(struct kvd_cpu_walk *w)
{
    const struct kvd_slice *slice = w->job->p->slice;
    struct kvd_cpu_run next = w->at < w->end ? run_at(w, w->at, w->end) : (struct kvd_cpu_run){0};
    while (w->at < w->end) {
        struct kvd_cpu_run run = next;
        w->ahead_rows = NULL;
        w->ahead.lines = 0;
        if (w->at + run.n < w->end) {
            next = run_at(w, w->at + run.n, w->end);
            look_ahead(w, &next);
        }
        w->job->kernel->run(w, &run);
        w->at += run.n;
        if (w->at < w->end && kvd_slice_over(slice))
            return false;
    }
    w->job->kernel->flush(w);
    w->active = false;
    return true;
}

// A thread's walk, among those of a slice.
static struct kvd_cpu_walk *turn_of(const struct kvd_attend_job *job, uint64_t thread)
{
    return (void *)(job->turns + thread * job->kernel->walk_bytes);
}

// The part of one thread in a slice: its walk that was kept, and new ones.
static void take_walks(struct kvd_attend_job *job, uint64_t turn)
{
    struct kvd_cpu_walk *w = turn_of(job, turn);
    for (;;) {
        if (!w->active) {
            uint64_t index = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
            if (index >= job->walks)
                return;
            begin_walk(w, job, index);
        }
        if (!walk_on(w))
            return;
        if (job->splits == 1)
            job->kernel->finish(job, &w->unit, w->out);
        if (kvd_slice_over(job->p->slice))
            return;
    }
}

static void take_turn(void *ctx, uint64_t turn)
{
    struct kvd_attend_job *job = ctx;
    const struct kvd_cpu_isa *isa = job->cpu->isa;
    if (isa->enter)
        isa->enter();
    take_walks(job, turn);
    if (isa->leave)
        isa->leave();
}

static void finish_one(void *ctx, uint64_t i)
{
    const struct kvd_attend_job *job = ctx;
    const struct kvd_cpu_kernel *k = job->kernel;
    struct kvd_cpu_unit u = unit_at(job, i);
    uint8_t *part = job->partials + i * job->splits * k->partial_bytes;
    for (uint32_t s = 1; s < job->splits; s++)
        k->merge(part, part + s * k->partial_bytes, u.rows, job->p->plane->head_dim_v);
    k->finish(job, &u, part);
}

// Where walks of a kind are while they are not kept: made when one is wanted first. NULL: out of
// memory.
static uint8_t *walks_of(struct kvd_cpu *cpu, const struct kvd_cpu_kernel *k)
{
    void **walks = k == &kvd_cpu_latent ? &cpu->latent_walks : &cpu->walks;
    if (!*walks)
        *walks = aligned_alloc(KVD_WALK_ALIGN, kvd_threads_count(cpu->threads) * k->walk_bytes);
    return *walks;
}

// What is kept between slices. In one piece of memory: walks, then partials, if there are any.
struct kept {
    uint64_t next;
    bool walks_kept;
    _Alignas(KVD_WALK_ALIGN) uint8_t bytes[];
};

static uint64_t turns_bytes(const struct kvd_attend_job *job)
{
    return kvd_threads_count(job->cpu->threads) * job->kernel->walk_bytes;
}

static struct kept *kept_new(const struct kvd_attend_job *job)
{
    uint64_t partials = (job->splits > 1 ? job->walks : 0) * job->kernel->partial_bytes;
    struct kept *kept = aligned_alloc(KVD_WALK_ALIGN, sizeof(*kept) + turns_bytes(job) + partials);
    if (kept) {
        kept->next = 0;
        kept->walks_kept = false;
    }
    return kept;
}

// Takes up the walks that the last slice left.
static void resume(struct kvd_attend_job *job, struct kept *kept, uint8_t *fresh)
{
    bool walks = kept && kept->walks_kept;
    job->turns = walks ? kept->bytes : fresh;
    atomic_init(&job->next, kept ? kept->next : 0);
    for (uint32_t i = 0; i < kvd_threads_count(job->cpu->threads); i++) {
        struct kvd_cpu_walk *w = turn_of(job, i);
        if (!walks)
            w->active = false;
        if (w->active)
            attach(w, job);
    }
}

static bool unfinished(const struct kvd_attend_job *job)
{
    bool any = atomic_load(&job->next) < job->walks;
    for (uint32_t i = 0; i < kvd_threads_count(job->cpu->threads); i++)
        any |= turn_of(job, i)->active;
    return any;
}

// Keeps what is not done for the next slice. False: all is done, or there is no memory to keep it.
static bool keep(struct kvd_attend_job *job, struct kvd_slice *slice)
{
    if (!unfinished(job))
        return false;
    struct kept *kept = slice->state ? slice->state : kept_new(job);
    if (!kept)
        return false;
    if (!kept->walks_kept)
        memcpy(kept->bytes, job->turns, turns_bytes(job));
    kept->walks_kept = true;
    kept->next = KVD_MIN(atomic_load(&job->next), job->walks);
    slice->state = kept;
    return true;
}

// Units of each item, added up, and how many splits they want.
static uint64_t *plan(const struct kvd_attend_params *p, struct kvd_attend_job *job)
{
    const struct kvd_plane *g = p->plane;
    uint64_t *first = calloc(p->n_items + 1, sizeof(*first)), longest = 0;
    uint32_t threads = kvd_threads_count(job->cpu->threads);
    if (!first)
        return NULL;
    for (uint32_t i = 0; i < p->n_items; i++) {
        uint64_t rows = (uint64_t)p->items[i].q_len * (g->q_heads / g->kv_heads);
        first[i + 1] =
            first[i] + kvd_div_up(rows, job->kernel->rows) * g->kv_heads * p->layer_count;
        longest = KVD_MAX(longest, total_tokens(&p->items[i]));
    }
    uint64_t units = first[p->n_items], want = job->kernel->walks_a_thread * (uint64_t)threads;
    if (units < want && threads > 1)
        job->splits = (uint32_t)KVD_MIN(kvd_div_up(want, units), longest / 512 + 1);
    job->walks = units * job->splits;
    job->first_unit = first;
    return first;
}

int kvd_cpu_attend(struct kvd_backend *b, const struct kvd_attend_params *p, struct kvd_error *err)
{
    struct kvd_attend_job job = {.cpu = (struct kvd_cpu *)b,
                                 .p = p,
                                 .kernel = p->plane->latent ? &kvd_cpu_latent : &kvd_cpu_heads,
                                 .splits = 1};
    struct kvd_slice *slice = p->slice;
    uint64_t *first KVD_FREE = plan(p, &job);
    uint8_t *fresh = walks_of(job.cpu, job.kernel);
    if (!first || !fresh)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    struct kept *kept = slice ? slice->state : NULL;
    if (job.splits > 1) {
        if (!kept && !(kept = kept_new(&job)))
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        job.partials = kept->bytes + turns_bytes(&job);
        if (slice)
            slice->state = kept;
    }
    resume(&job, kept, fresh);
    kvd_threads_run(job.cpu->threads, kvd_threads_count(job.cpu->threads), take_turn, &job);
    if (slice && (slice->more = keep(&job, slice)))
        return KVD_OK;
    if (slice && unfinished(&job)) { // and there was no memory to keep it
        struct kvd_attend_params whole = *p;
        whole.slice = NULL;
        job.p = &whole;
        kvd_threads_run(job.cpu->threads, kvd_threads_count(job.cpu->threads), take_turn, &job);
        job.p = p;
    }
    if (job.splits > 1)
        kvd_threads_run(job.cpu->threads, first[p->n_items], finish_one, &job);
    if (!slice)
        free(kept);
    return KVD_OK;
}

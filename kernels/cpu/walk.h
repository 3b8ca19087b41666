// Attention on the CPU: what is shared by its kinds, attention over heads of K and V (heads.c) and
// over latents (latent.c).
//
// A *unit* is a few query rows of one (sequence, layer, kv head); a row is one (query, q head).
// With few units the tokens are split among threads and the partial results merged. A *walk* is the
// way over one split of a unit's tokens, in *runs* of up to 64 that lie together; a thread has one
// at a time.
#ifndef KVD_KERNELS_CPU_WALK_H
#define KVD_KERNELS_CPU_WALK_H

#include <stdatomic.h>

#include "kernels/cpu/cpu.h"

enum {
    KVD_WALK_ALIGN = 64,     // a vector of the widest kind lies in one line of the cache
    KVD_RUNS_IN_FLOAT = 256, // so many are summed in float, and then added to a partial
};

struct kvd_cpu_unit {
    const struct kvd_attend_item *item;
    uint32_t layer, head; // layer counts from layer_begin
    uint32_t row0, rows;
};

// Up to 64 tokens that lie together.
struct kvd_cpu_run {
    uint64_t begin; // position of the first
    uint32_t n;
    const uint8_t *tile;  // NULL for new tokens
    const uint8_t *k, *v; // rows of bf16; NULL: the tile has codes
    uint64_t k_stride, v_stride;
};

struct kvd_cpu_kernel;

struct kvd_attend_job {
    struct kvd_cpu *cpu;
    const struct kvd_attend_params *p;
    const struct kvd_cpu_kernel *kernel;
    const uint64_t *first_unit; // per item, and the total
    uint32_t splits;
    uint8_t *partials;     // [unit][split]; NULL with one split
    uint64_t walks;        // units x splits
    _Atomic uint64_t next; // the walk to begin next
    uint8_t *turns;        // walks, one a thread
};

// What every walk has; a kernel's own begin with it.
struct kvd_cpu_walk {
    bool active; // begun and not done
    const struct kvd_attend_job *job;
    uint64_t index; // among the job's walks
    struct kvd_cpu_unit unit;
    uint64_t at, end;           // tokens that are left
    void *out;                  // its partial
    const uint8_t *ahead_rows;  // of bf16, of the next run, where it has any
    struct kvd_cpu_ahead ahead; // of codes
};

// A kind of attention. Walks and partials are copied and moved as bytes; their sizes are multiples
// of KVD_WALK_ALIGN.
struct kvd_cpu_kernel {
    uint32_t rows;                      // of a unit, at most
    uint32_t walks_a_thread;            // that are made of few units, for even loads
    uint64_t walk_bytes, partial_bytes; // a walk has room for a partial:
    uint64_t partial_at;                // for where there is one split
    // Empties the partial and the sums, and takes up the unit's queries.
    void (*begin)(struct kvd_cpu_walk *w);
    void (*run)(struct kvd_cpu_walk *w, const struct kvd_cpu_run *run);
    void (*flush)(struct kvd_cpu_walk *w); // adds all sums to the partial
    void (*merge)(void *to, const void *from, uint32_t rows, uint32_t dim);
    void (*finish)(const struct kvd_attend_job *job, const struct kvd_cpu_unit *u,
                   const void *part); // writes o and lse
};
extern const struct kvd_cpu_kernel kvd_cpu_heads;
extern const struct kvd_cpu_kernel kvd_cpu_latent;

static inline uint32_t kvd_job_group(const struct kvd_attend_job *job)
{
    return job->p->plane->q_heads / job->p->plane->kv_heads;
}

// Of a run, the tokens [lo, hi) that a row of a walk's unit sees; lo >= hi: none.
void kvd_cpu_visible(const struct kvd_cpu_walk *w, const struct kvd_cpu_run *run, uint32_t row,
                     uint32_t *lo, uint32_t *hi);

// Adds a sink to a row's maximum and sum. Returns what the sums of values are worth then.
double kvd_cpu_add_sink(float sink, double *m, double *l);

// Scale and centre of the tokens of a tile, for the levels of kvd_cpu_levels.
void kvd_cpu_params(const struct kvd_plane *g, const struct kvd_cpu_run *run, bool v,
                    struct kvd_affine param[KVD_PAGE_TOKENS]);

#endif

// Dense tensors that pages of an engine's blocks go through, and copies between both.
#include "kernels/cpu/cpu.h"

int kvd_cpu_dense(struct kvd_backend *b, uint64_t least, uint64_t wanted, struct kvd_dense *out,
                  struct kvd_error *err)
{
    struct kvd_cpu *cpu = (struct kvd_cpu *)b;
    (void)least;
    if (cpu->dense_bytes < wanted) {
        free(cpu->dense);
        cpu->dense_bytes = wanted;
        cpu->dense = malloc(wanted);
        if (!cpu->dense) {
            cpu->dense_bytes = 0;
            return kvd_fail(err, KVD_E_FULL, "out of memory for gathering pages");
        }
    }
    *out = (struct kvd_dense){.data = cpu->dense, .bytes = cpu->dense_bytes};
    return KVD_OK;
}

struct paged_job {
    const struct kvd_paged_kv *p;
    const struct kvd_paged_copy *copy;
};

static void copy_layer(void *ctx, uint64_t i)
{
    const struct paged_job *job = ctx;
    const struct kvd_paged_copy *all = job->copy;
    struct kvd_paged_copy one = *all;
    one.layer += (uint32_t)i;
    one.layers = 1;
    for (int v = 0; v < 2; v++)
        one.dense[v] += i * all->dense_tokens * job->p->heads * job->p->side[v].dim * 2;
    kvd_paged_copy(job->p, &one);
}

int kvd_cpu_paged(struct kvd_backend *b, const struct kvd_paged_kv *p,
                  const struct kvd_paged_copy *copy, struct kvd_error *err)
{
    struct paged_job job = {p, copy};
    (void)err;
    kvd_threads_run(((struct kvd_cpu *)b)->threads, copy->layers, copy_layer, &job);
    return KVD_OK;
}

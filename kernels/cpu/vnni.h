// The inner loops that processors with VNNI and without AMX have of their own (vnni.c), for the
// table that avx512.c makes of them and its own.
#ifndef KVD_KERNELS_CPU_VNNI_H
#define KVD_KERNELS_CPU_VNNI_H

#include "kernels/cpu/cpu.h"

bool kvd_vnni_supported(void);

void kvd_vnni_q_prepare(uint32_t codec, const struct kvd_tc_coder *tc, const float *q, uint32_t dim,
                        float *out);
void kvd_vnni_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                       uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead);
void kvd_vnni_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                        uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead);
void kvd_vnni_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                           uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead);
void kvd_vnni_v_reduce(uint32_t codec, const float *acc, uint32_t dim, float *o);

#endif

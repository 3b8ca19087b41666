// The inner loops that AMX has of its own (amx.c), for the table that avx512.c makes of them and
// its own.
#ifndef KVD_KERNELS_CPU_AMX_H
#define KVD_KERNELS_CPU_AMX_H

#include "kernels/cpu/cpu.h"

// Whether processor and kernel have tiles. Asks the kernel for them, for this process.
bool kvd_amx_supported(void);

// Between these two a thread may run the loops below.
void kvd_amx_enter(void);
void kvd_amx_leave(void);

void kvd_amx_q_prepare(uint32_t codec, const struct kvd_tc_coder *tc, const float *q, uint32_t dim,
                       float *out);
void kvd_amx_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                      uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead);
void kvd_amx_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                       uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead);
void kvd_amx_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                          uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead);
void kvd_amx_v_reduce(uint32_t codec, const float *acc, uint32_t dim, float *o);

#endif

// What bounds attention on a CPU, measured: multiply-adds from registers, and reads of memory.
#ifndef KVD_TESTS_CPU_LIMITS_H
#define KVD_TESTS_CPU_LIMITS_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { LIMIT_RUNS = 15 };

#ifdef __x86_64__
#include <immintrin.h>

// Twelve sums do not wait for each other; the compiler must neither drop nor merge them.
#define KVD_TWELVE(f) f(a0) f(a1) f(a2) f(a3) f(a4) f(a5) f(a6) f(a7) f(a8) f(a9) f(b0) f(b1)

#define KVD_FMAS(name, isa, vector, zero, fma)                                                     \
    __attribute__((target(isa))) static void name(uint64_t rounds)                                 \
    {                                                                                              \
        vector x = zero, y = zero, a0 = x, a1 = x, a2 = x, a3 = x, a4 = x, a5 = x, a6 = x, a7 = x, \
               a8 = x, a9 = x, b0 = x, b1 = x;                                                     \
        __asm__ volatile("" : "+v"(x), "+v"(y));                                                   \
        for (uint64_t i = 0; i < rounds; i++) {                                                    \
            KVD_TWELVE(fma)                                                                        \
        }                                                                                          \
    }
#define KVD_FMA_512(a)                                                                             \
    a = _mm512_fmadd_ps(x, y, a);                                                                  \
    __asm__ volatile("" : "+v"(a));
#define KVD_FMA_256(a)                                                                             \
    a = _mm256_fmadd_ps(x, y, a);                                                                  \
    __asm__ volatile("" : "+v"(a));
KVD_FMAS(limit_fmas_512, "avx512f", __m512, _mm512_setzero_ps(), KVD_FMA_512)
KVD_FMAS(limit_fmas_256, "avx2,fma", __m256, _mm256_setzero_ps(), KVD_FMA_256)
#undef KVD_FMA_512
#undef KVD_FMA_256
#undef KVD_FMAS
#undef KVD_TWELVE

__attribute__((target("avx2"))) static void limit_reads(const uint8_t *p, uint64_t bytes)
{
    __m256i s = _mm256_setzero_si256();
    for (uint64_t i = 0; i + 128 <= bytes; i += 128)
        for (uint64_t j = 0; j < 128; j += 32)
            s = _mm256_or_si256(s, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + j)));
    __asm__ volatile("" ::"x"(s));
}

struct limit_part {
    uint64_t rounds;
    const uint8_t *memory; // NULL: multiply-adds
    uint64_t bytes;
    int lanes;
    pthread_barrier_t *start;
    double seconds; // of the thread's own, the least of all runs
};

static void *limit_thread(void *arg)
{
    struct limit_part *p = arg;
    p->seconds = 1e9;
    for (int i = 0; i < LIMIT_RUNS; i++) {
        struct timespec a, b;
        pthread_barrier_wait(p->start);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
        if (p->memory)
            limit_reads(p->memory, p->bytes);
        else if (p->lanes == 16)
            limit_fmas_512(p->rounds);
        else
            limit_fmas_256(p->rounds);
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
        double t = (double)(b.tv_sec - a.tv_sec) + (double)(b.tv_nsec - a.tv_nsec) * 1e-9;
        p->seconds = t < p->seconds ? t : p->seconds;
    }
    return NULL;
}

// Two threads share the work; the later one counts.
static double limit_run(struct limit_part each)
{
    pthread_barrier_t start;
    pthread_t other;
    struct limit_part part[2] = {each, each};
    pthread_barrier_init(&start, NULL, 2);
    part[0].start = part[1].start = &start;
    if (each.memory)
        part[1].memory += each.bytes;
    if (pthread_create(&other, NULL, limit_thread, &part[1]))
        abort();
    limit_thread(&part[0]);
    pthread_join(other, NULL);
    pthread_barrier_destroy(&start);
    return part[0].seconds > part[1].seconds ? part[0].seconds : part[1].seconds;
}

// Seconds that so many multiply-adds of floats take in vectors of 16 or 8 lanes. 0: not here.
static double limit_of_fmas(double fmas, int lanes)
{
    if (!__builtin_cpu_supports("fma") || (lanes == 16 && !__builtin_cpu_supports("avx512f")))
        return 0;
    return limit_run(
        (struct limit_part){.rounds = (uint64_t)(fmas / 2 / 12 / lanes) + 1, .lanes = lanes});
}

// Seconds that reading so many bytes takes, which lie where a cache as large as they may keep them,
// as pages would that were read before.
static double limit_of_reads(double bytes)
{
    uint64_t half = (uint64_t)(bytes / 2) / 128 * 128 + 128;
    if (!__builtin_cpu_supports("avx2"))
        return 0;
    uint8_t *memory = malloc(2 * half);
    if (!memory)
        abort();
    memset(memory, 1, 2 * half);
    double t = limit_run((struct limit_part){.memory = memory, .bytes = half});
    free(memory);
    return t;
}
#else
static double limit_of_fmas(double fmas, int lanes)
{
    (void)fmas, (void)lanes;
    return 0;
}
static double limit_of_reads(double bytes)
{
    (void)bytes;
    return 0;
}
#endif

#endif

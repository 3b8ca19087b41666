// How the CUDA backend cuts attention into blocks: host code, needs no GPU.
#include "kernels/cuda/api.h"
#include "kernels/format.h"
#include "tests/unit/suite.h"

enum { PROCESSORS = 132, WARPS_A_PROCESSOR = 16 }; // int2 at head_dim 128 on an H100

static struct kvd_cuda_attend_params step(uint32_t sequences, uint32_t q_heads, uint32_t kv_heads,
                                          uint32_t q_len)
{
    return (struct kvd_cuda_attend_params){.sequences = sequences,
                                           .q_heads = q_heads,
                                           .kv_heads = kv_heads,
                                           .dim_k = 128,
                                           .dim_v = 128,
                                           .codec = KVD_CODEC_INT2,
                                           .codec_v = KVD_CODEC_INT2,
                                           .q_len = q_len,
                                           .scale = 0.1f};
}

// Tiles that the busiest place of the GPU takes, with equal histories; and how many places there
// are.
static uint32_t busiest(struct kvd_cuda_attend_params *p, uint32_t tiles, uint32_t *slots,
                        uint32_t *waves)
{
    kvd_cuda_attend_plan(p, (uint64_t)p->sequences * tiles * KVD_PAGE_TOKENS,
                         tiles * KVD_PAGE_TOKENS, 0, PROCESSORS);
    *slots = PROCESSORS * WARPS_A_PROCESSOR / p->warps;
    if (p->shares) { // each place takes one, in one piece or two
        *waves = 1;
        ck_assert_uint_le(p->shares * p->kv_heads, *slots);
        ck_assert_uint_ge(p->splits, (p->shares - 1) / p->sequences + 2);
        return (tiles * p->sequences + p->shares - 1) / p->shares + 1;
    }
    *waves = (p->sequences * p->kv_heads * p->splits + *slots - 1) / *slots;
    return *waves * ((tiles + p->splits - 1) / p->splits);
}

START_TEST(equal_histories_fill_the_gpu)
{
    static const uint32_t lengths[] = {256, 512, 1024, 2048};
    for (size_t i = 0; i < KVD_LEN(lengths); i++)
        for (uint32_t n = 9; n <= 300; n++) {
            struct kvd_cuda_attend_params p = step(n, 32, 8, 1);
            uint32_t slots, waves, most = busiest(&p, lengths[i], &slots, &waves);
            double even = (double)n * 8 * lengths[i] / slots;
            ck_assert_msg(most <= 1.25 * even,
                          "%u x %u tiles: %u parts, the busiest place takes %u tiles of %.0f", n,
                          lengths[i], p.splits, most, even);
        }
}
END_TEST

// Where parts of their own would leave many places empty.
START_TEST(odd_batches_are_cut_together)
{
    static const uint32_t together[] = {17, 18, 25, 28}, apart[] = {12, 24, 32, 33, 66, 132};
    for (size_t i = 0; i < KVD_LEN(together); i++) {
        struct kvd_cuda_attend_params p = step(together[i], 32, 8, 1);
        uint32_t slots, waves, most = busiest(&p, 512, &slots, &waves);
        ck_assert_uint_eq(p.shares, 33);
        ck_assert_double_le(most, 1.01 * together[i] * 8 * 512 / slots + 1);
        p.q_len = 2; // of which there are no kernels for shares
        busiest(&p, 512, &slots, &waves);
        ck_assert_uint_eq(p.shares, 0);
    }
    for (size_t i = 0; i < KVD_LEN(apart); i++) {
        struct kvd_cuda_attend_params p = step(apart[i], 32, 8, 1);
        uint32_t slots, waves;
        busiest(&p, 512, &slots, &waves);
        ck_assert_uint_eq(p.shares, 0);
    }
}
END_TEST

START_TEST(parts_of_several_waves_are_long)
{
    for (uint32_t tiles = 1; tiles <= 300; tiles++)
        for (uint32_t n = 1; n <= 300; n += 7) {
            struct kvd_cuda_attend_params p = step(n, 32, 8, 1);
            uint32_t slots, waves;
            busiest(&p, tiles, &slots, &waves);
            ck_assert_msg(p.splits <= 1 || waves == 1 || tiles / p.splits >= 40,
                          "%u x %u tiles: %u parts in %u waves", n, tiles, p.splits, waves);
            ck_assert(p.shares == 0 || p.part_tiles >= 48); // a place takes two pieces
        }
}
END_TEST

// A single block that finds no place costs half of the time of a short step.
START_TEST(few_sequences_and_their_windows_run_at_once)
{
    for (uint32_t n = 1; n <= 4; n++)
        for (uint32_t tiles = 16; tiles <= 600; tiles++) {
            struct kvd_cuda_attend_params p = step(n, 32, 8, 1);
            kvd_cuda_attend_plan(&p, (uint64_t)n * tiles * KVD_PAGE_TOKENS, tiles * KVD_PAGE_TOKENS,
                                 320, PROCESSORS);
            uint32_t blocks = n * 8 * (p.splits + p.window_splits);
            ck_assert_msg(blocks <= PROCESSORS * WARPS_A_PROCESSOR / p.warps,
                          "%u x %u tiles: %u + %u parts of %u warps", n, tiles, p.splits,
                          p.window_splits, p.warps);
        }
}
END_TEST

START_TEST(any_step_has_a_plan)
{
    uint64_t seed = kvd_test_seed("plan");
    static const uint32_t dims[][2] = {
#define KVD_HEAD_DIMS(k, v) {k, v},
#include "proto/head_dims.def"
    };
    for (int i = 0; i < 20000; i++) {
        uint32_t kv = 1 + (uint32_t)(kvd_rand(&seed) % 16),
                 group = 1 + (uint32_t)(kvd_rand(&seed) % 16);
        struct kvd_cuda_attend_params p = step(1 + (uint32_t)(kvd_rand(&seed) % 400), kv * group,
                                               kv, 1 + (uint32_t)(kvd_rand(&seed) % 40));
        const uint32_t *d = dims[kvd_rand(&seed) % KVD_LEN(dims)];
        p.dim_k = d[0];
        p.dim_v = d[1];
        p.codec = p.codec_v = (uint32_t)(kvd_rand(&seed) % KVD_CODEC_COUNT);
        if (i % 3 == 0)
            p.codec_v = (uint32_t)(kvd_rand(&seed) % KVD_CODEC_COUNT);
        uint32_t longest = (uint32_t)(kvd_rand(&seed) % (1 << kvd_rand(&seed) % 21));
        uint64_t sum = longest + kvd_rand(&seed) % ((uint64_t)longest * (p.sequences - 1) + 1);
        uint32_t window = longest ? (uint32_t)(kvd_rand(&seed) % 700) : 1;
        kvd_cuda_attend_plan(&p, sum, longest, window, 1 + (uint32_t)(kvd_rand(&seed) % 200));
        ck_assert_uint_ge(p.part_tiles, 1);
        ck_assert_uint_le(p.splits, 128);
        ck_assert_uint_ge(p.splits + p.window_splits, 1);
        if (longest && kvd_codecs_rotated((struct kvd_codecs){p.codec, p.codec_v}))
            ck_assert_uint_ge(p.splits, 1);
        if (window)
            ck_assert_uint_ge(p.window_splits, 1);
        ck_assert(p.warps == 4 || p.warps == 8 || p.warps == 16);
        ck_assert(p.shares == 0 || (p.warps == 8 && p.shares >= p.sequences &&
                                    p.splits > (p.shares - 1) / p.sequences + 1));
        // A counter for each (sequence, kv head), at least, and the parts behind them.
        ck_assert_uint_ge(p.scratch_zeroed, (uint64_t)p.sequences * kv * 4);
        uint64_t parts = (uint64_t)p.sequences * kv * (p.splits + p.window_splits);
        ck_assert_uint_ge(kvd_cuda_attend_scratch(&p), p.scratch_zeroed + parts * p.dim_v * 4 * 8);
    }
}
END_TEST

// Over latents, which have a plan of their own.
START_TEST(latents_have_plans)
{
    uint64_t seed = kvd_test_seed("latents");
    for (int i = 0; i < 20000; i++) {
        uint32_t heads = 1 + (uint32_t)(kvd_rand(&seed) % KVD_MAX_LATENT_GROUP);
        struct kvd_cuda_attend_params p = step(1 + (uint32_t)(kvd_rand(&seed) % 400), heads, 1,
                                               1 + (uint32_t)(kvd_rand(&seed) % 8));
        p.dim_k = 64;
        p.dim_v = 512;
        p.codec = KVD_CODEC_BF16;
        p.codec_v = i % 5 ? KVD_CODEC_INT2 : KVD_CODEC_BF16;
        uint32_t longest = (uint32_t)(kvd_rand(&seed) % (1 << kvd_rand(&seed) % 21));
        bool ragged = i % 2;
        uint64_t sum = ragged
                           ? longest + kvd_rand(&seed) % ((uint64_t)longest * (p.sequences - 1) + 1)
                           : (uint64_t)longest * p.sequences;
        uint32_t window = longest ? (uint32_t)(kvd_rand(&seed) % 700) : 1;
        kvd_cuda_attend_plan(&p, sum, longest, window, PROCESSORS);
        uint32_t tiles = (longest + KVD_PAGE_TOKENS - 1) / KVD_PAGE_TOKENS;
        // Products are cut off at their end: a part is no longer than errors may grow in it.
        ck_assert(p.part_tiles >= 1 && p.part_tiles <= 1024);
        ck_assert(p.splits <= 128 && p.splits + p.window_splits >= 1 && p.splits >= (longest > 0));
        ck_assert((uint64_t)p.splits * p.part_tiles >= tiles);
        ck_assert(p.window_splits >= (window > 0) && p.window_splits <= 32);
        ck_assert_uint_eq(p.scratch_zeroed, 0);
        uint64_t rows = (uint64_t)p.sequences * p.q_len * heads;
        ck_assert_uint_ge(kvd_cuda_attend_scratch(&p),
                          rows * (p.splits + p.window_splits) * (p.dim_v + 2) * 4);
    }
}
END_TEST

KVD_MAIN("plan", 60, equal_histories_fill_the_gpu, odd_batches_are_cut_together,
         parts_of_several_waves_are_long, few_sequences_and_their_windows_run_at_once,
         any_step_has_a_plan, latents_have_plans)

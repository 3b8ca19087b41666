// Inner loops with AMX: history as products of small integers, in tiles of 16 x 64 bytes. What is
// not here is AVX-512's, which every such processor has.
//
// Twice a level about the centre is an odd number of few bits, so a tile of codes is a matrix of
// signed bytes, and exact. Queries and probabilities are made fixed-point numbers of 22 bits and a
// sign, of their row's largest in a tile, and these three *digits* of base 256 each, -128 to 127.
// The three products with codes are exact too; they meet in float. So what is lost is a 2^22nd of
// the largest of a row, as in fp32's own sums of such products.
//
// The left operand has a row for each of four digits (the fourth counts for nothing) of each of
// four rows of queries; the right one has codes, four of one column side by side: as pages have
// them for K, but for a transposition (k_rows), and for V after a shuffle (v_rows).
#include "kernels/cpu/amx.h"

#include "kernels/cpu/digits_tc.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    LINES = 4,                 // of a row of queries in the left operand
    REQ_XCOMP_PERM = 0x1023,   // of arch_prctl: may this process use ...
    TILE_DATA = 18,            // ... tiles?
    SAVED = 1 << 17 | 1 << 18, // by the kernel, of the processor's state: tiles
};

// Tiles are written and read by instructions of which compilers do not know what they touch.
#define SEEN() __asm__ volatile("" ::: "memory")

// -- whether this process may use tiles ----------------------------------------------------------

static bool processor_has_tiles(void)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
        return false;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & SAVED) != SAVED || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return false;
    const unsigned vbmi = 1u << 1, gfni = 1u << 8, tile = 1u << 24, int8 = 1u << 25;
    return c & gfni && c & vbmi && d & tile && d & int8;
}

// Linux keeps 8 KiB of tiles for threads of processes that asked for it once.
bool kvd_amx_supported(void)
{
    return kvd_cpu_avx512.supported() && processor_has_tiles() &&
           syscall(SYS_arch_prctl, REQ_XCOMP_PERM, TILE_DATA) == 0;
}

void kvd_amx_enter(void)
{
    // All eight tiles are 16 rows of 64 bytes.
    _Alignas(LINE) struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shape.row_bytes[i] = LINE;
        shape.rows[i] = 16;
    }
    SEEN();
    _tile_loadconfig(&shape);
}

void kvd_amx_leave(void)
{
    _tile_release();
}

// -- numbers as digits ---------------------------------------------------------------------------

// What products are worth, digit by digit.
static inline __m512 sum_of(const int32_t *c, __m512 worth[DIGITS], __m512 sum)
{
    for (int i = 0; i < DIGITS; i++)
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(c + i * 16)), worth[i], sum);
    return sum;
}

static inline void worth_of(float from, __m512 worth[DIGITS])
{
    for (int i = 0; i < DIGITS; i++, from *= 256)
        worth[i] = _mm512_set1_ps(from);
}

// -- codes as twice their levels -----------------------------------------------------------------

// An affine map over the bits of a byte: bit i of the result is the parity of those that byte 7 - i
// of the matrix has, and a constant.
static inline __m512i map_to(uint32_t bit, uint64_t from)
{
    uint64_t place = from << (8 * (7 - bit));
    return _mm512_set1_epi64((long long)place);
}

struct maps {
    __m512i low[SLOTS], high[SLOTS];
};

// Codes of two bits c: 2 c - 3 has bit 0, then c's low bit, then its high bit's contrary to the
// top. Of four bits: 2 c - 15, the same with three bits below.
static inline struct maps maps_of(bool four)
{
    struct maps m;
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        uint64_t c0 = 1u << (2 * slot), c1 = c0 << 1;
        __m512i low = map_to(1, c0), high = map_to(3, c0);
        for (uint32_t bit = 2; bit < 8 && !four; bit++)
            low = _mm512_or_si512(low, map_to(bit, c1));
        if (four)
            low = _mm512_or_si512(low, map_to(2, c1));
        for (uint32_t bit = 4; bit < 8; bit++)
            high = _mm512_or_si512(high, map_to(bit, c1));
        m.low[slot] = low;
        m.high[slot] = high;
    }
    return m;
}

static KVD_BY_CASE __m512i levels_of(const bool four, const struct maps *m, __m512i low,
                                     __m512i high, int slot)
{
    if (!four)
        return _mm512_gf2p8affine_epi64_epi8(low, m->low[slot], 0xfd);
    return _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(low, m->low[slot], 0),
                            _mm512_gf2p8affine_epi64_epi8(high, m->high[slot], 0xf1));
}

// Four vectors of four lanes of 16 bytes: out[i] has the i-th lane of each.
static inline void transpose_lanes(const __m512i x[4], __m512i out[4])
{
    __m512i a = _mm512_shuffle_i64x2(x[0], x[1], 0x88), b = _mm512_shuffle_i64x2(x[2], x[3], 0x88);
    __m512i c = _mm512_shuffle_i64x2(x[0], x[1], 0xdd), d = _mm512_shuffle_i64x2(x[2], x[3], 0xdd);
    out[0] = _mm512_shuffle_i64x2(a, b, 0x88);
    out[1] = _mm512_shuffle_i64x2(c, d, 0x88);
    out[2] = _mm512_shuffle_i64x2(a, b, 0xdd);
    out[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
}

// A chunk's words of K by channels: word n of out[2t + h] has those 2t + 8h + e of the channel
// tiles, of token n / 2 + 8 (n & 1).
static inline void k_rows(const uint8_t *codes, __m512i out[8])
{
    __m512i even[4], odd[4], lanes[4];
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_loadu_si512(codes + 128 * i),
                b = _mm512_loadu_si512(codes + 128 * i + 64);
        even[i] = _mm512_unpacklo_epi64(a, b);
        odd[i] = _mm512_unpackhi_epi64(a, b);
    }
    transpose_lanes(even, lanes);
    for (int i = 0; i < 4; i++)
        out[2 * i] = lanes[i];
    transpose_lanes(odd, lanes);
    for (int i = 0; i < 4; i++)
        out[2 * i + 1] = lanes[i];
}

// Half a chunk's words of V by tokens: word 4g + 2h + e of out[t] has those 2t + {0, 1, 8, 9}, of
// the half's channel g and 8 more for h, of channel tiles: slot + 4e.
static inline void v_rows(const uint8_t *codes, __m512i out[4])
{
    __m512i x[4];
    for (int i = 0; i < 4; i++)
        x[i] = digit_words(codes + 64 * i);
    transpose_lanes(x, out);
}

// -- K -------------------------------------------------------------------------------------------

// The channel whose codes are byte i of a block's lines.
static uint32_t k_channel(uint32_t i)
{
    uint32_t slot = i / 32, row = i % 32 / 4, byte = i % 4;
    return (slot + 4 * (byte & 1)) * 16 + row / 2 * 2 + 8 * (row & 1) + (byte >> 1);
}

// A block's codes of a side: of each chunk two tiles, of two slots each.
struct k_block {
    _Alignas(LINE) uint8_t x[4][2][16][LINE];
};

static KVD_BY_CASE void k_unpack(const bool four, const struct maps *maps, const uint8_t *codes,
                                 uint32_t dim, uint32_t chunk, struct k_block *to)
{
    __m512i low[8], high[8];
    k_rows(codes + chunk * 4 * dim, low);
    if (four)
        k_rows(codes + (16 + chunk * 4) * dim, high);
    for (int row = 0; row < 8; row++)
        for (int slot = 0; slot < SLOTS; slot++)
            _mm512_store_si512(to->x[chunk][slot / 2][slot % 2 * 8 + row],
                               levels_of(four, maps, low[row], high[four ? row : 0], slot));
    SEEN();
}

#define K_CHUNK(n)                                                                                 \
    _tile_loadd(6, b.x[n][0], LINE);                                                               \
    _tile_dpbssd(n, 4, 6);                                                                         \
    _tile_loadd(7, b.x[n][1], LINE);                                                               \
    _tile_dpbssd(n, 5, 7);

// Of a block, from its first channel on. Tiles are loaded when a chunk more was unpacked: what was
// just stored would be waited for.
static KVD_BY_CASE void k_products(const bool four, const uint8_t *codes, const uint8_t *q,
                                   uint32_t dim)
{
    struct k_block b;
    struct maps maps = maps_of(four);
    _tile_loadd(4, q, 2 * dim);
    _tile_loadd(5, q + LINE, 2 * dim);
    k_unpack(four, &maps, codes, dim, 0, &b);
    k_unpack(four, &maps, codes, dim, 1, &b);
    K_CHUNK(0)
    k_unpack(four, &maps, codes, dim, 2, &b);
    K_CHUNK(1)
    k_unpack(four, &maps, codes, dim, 3, &b);
    K_CHUNK(2)
    K_CHUNK(3)
}

static inline void k_store(int32_t c[4][4 * LINES][16])
{
    _tile_stored(0, c[0], LINE);
    _tile_stored(1, c[1], LINE);
    _tile_stored(2, c[2], LINE);
    _tile_stored(3, c[3], LINE);
    SEEN();
}

// from: half of what products are worth, of each row.
static inline void k_sums(int32_t c[4][4 * LINES][16], const float *from, uint32_t rows,
                          float *scores)
{
    const __m512i order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (uint32_t r = 0; r < rows; r++) {
        __m512 worth[DIGITS];
        worth_of(from[r], worth);
        for (uint32_t chunk = 0; chunk < 4; chunk++) {
            __m512 s = sum_of(c[chunk][r * LINES], worth, _mm512_setzero_ps());
            _mm512_storeu_ps(scores + r * KVD_PAGE_TOKENS + chunk * 16,
                             _mm512_permutexvar_ps(order, s));
        }
    }
}

void kvd_amx_k_scores(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *q,
                      uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    if (!digits_take(codec, dim, false)) {
        kvd_cpu_avx512.k_scores(codec, codes, dim, q, rows, scores, ahead);
        return;
    }
    kvd_cpu_ask(ahead, KVD_LOOP_ASKS);
    _Alignas(LINE) int32_t c[4][4 * LINES][16];
    float from[KVD_CPU_ROWS];
    for (uint32_t r = 0; r < rows; r++)
        from[r] = q[(r + 1) * 2 * dim - 1];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (uint32_t at = 0; at < dim; at += BLOCK) {
        const uint8_t *block = codes + at / BLOCK * BLOCK_BYTES, *lines = (const uint8_t *)q + at;
        if (kvd_codec_bits(codec) == 4)
            k_products(true, block, lines, dim);
        else
            k_products(false, block, lines, dim);
    }
    k_store(c);
    k_sums(c, from, rows, scores);
}

#include "kernels/cpu/amx_tc.inc.h"

void kvd_amx_q_prepare(uint32_t codec, const struct kvd_tc_coder *tc, const float *q, uint32_t dim,
                       float *out)
{
    float x[KVD_MAX_HEAD_DIM];
    if (kvd_codec_tc(codec)) {
        tc_prepare(tc, q, out);
        return;
    }
    if (!digits_take(codec, dim, false)) {
        kvd_cpu_avx512.q_prepare(codec, tc, q, dim, out);
        return;
    }
    for (uint32_t i = 0; i < dim; i++)
        x[i] = q[i / BLOCK * BLOCK + k_channel(i % BLOCK)];
    out[2 * dim - 1] = digit_lines(q, dim, x, dim, out);
}

// -- V -------------------------------------------------------------------------------------------

// A block's codes: tiles [half][slot], rows 4 t + chunk. Products: [half][slot].
struct v_block {
    _Alignas(LINE) uint8_t x[2][SLOTS][16][LINE];
    _Alignas(LINE) int32_t c[2][SLOTS][4 * LINES][16];
};

// codes: of the half's first channels.
static KVD_BY_CASE void v_unpack(const bool four, const struct maps *maps, const uint8_t *codes,
                                 uint32_t dim, uint8_t to[SLOTS][16][LINE])
{
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        __m512i low[4], high[4];
        v_rows(codes + chunk * 4 * dim, low);
        if (four)
            v_rows(codes + (16 + chunk * 4) * dim, high);
        for (uint32_t row = 0; row < 4; row++)
            for (int slot = 0; slot < SLOTS; slot++)
                _mm512_store_si512(to[slot][row * 4 + chunk],
                                   levels_of(four, maps, low[row], high[four ? row : 0], slot));
    }
    SEEN();
}

#define V_TILE(n, b_tile, half)                                                                    \
    _tile_zero(n);                                                                                 \
    _tile_loadd(b_tile, b.x[half][n], LINE);                                                       \
    _tile_dpbssd(n, 4, b_tile);                                                                    \
    _tile_stored(n, b.c[half][n], LINE);
#define V_HALF(half)                                                                               \
    V_TILE(0, 6, half)                                                                             \
    V_TILE(1, 7, half)                                                                             \
    V_TILE(2, 6, half)                                                                             \
    V_TILE(3, 7, half)

// What products are worth is `from` of each row.
static inline void v_add(const struct v_block *b, uint32_t half, const float *from, uint32_t dim,
                         uint32_t rows, float *acc)
{
    for (uint32_t r = 0; r < rows; r++) {
        __m512 worth[DIGITS];
        worth_of(from[r], worth);
        for (uint32_t slot = 0; slot < SLOTS; slot++) {
            float *to = acc + r * 8 * dim + (half * SLOTS + slot) * 16;
            _mm512_storeu_ps(to, sum_of(b->c[half][slot][r * LINES], worth, _mm512_loadu_ps(to)));
        }
    }
}

// Of a block, whose first channel's sums are at acc. As with keys, what was just stored is left
// alone for a while.
static KVD_BY_CASE void v_products(const bool four, const uint8_t *codes, uint32_t dim,
                                   const float *from, uint32_t rows, float *acc)
{
    struct v_block b;
    struct maps maps = maps_of(four);
    v_unpack(four, &maps, codes, dim, b.x[0]);
    v_unpack(four, &maps, codes + BLOCK_BYTES / 2, dim, b.x[1]);
    V_HALF(0)
    V_HALF(1)
    SEEN();
    v_add(&b, 0, from, dim, rows, acc);
    v_add(&b, 1, from, dim, rows, acc);
}

void kvd_amx_v_accumulate(uint32_t codec, const uint8_t *codes, uint32_t dim, const float *p,
                          uint32_t rows, float *acc, struct kvd_cpu_ahead *ahead)
{
    if (!digits_take(codec, dim, true)) {
        kvd_cpu_avx512.v_accumulate(codec, codes, dim, p, rows, acc, ahead);
        return;
    }
    kvd_cpu_ask(ahead, KVD_LOOP_ASKS);
    __m512i digits[KVD_CPU_ROWS][LINES];
    float from[KVD_CPU_ROWS];
    for (uint32_t r = 0; r < rows; r++)
        from[r] = digit_step(codec) * digit_tokens(p + r * KVD_PAGE_TOKENS, digits[r]);
    SEEN();
    _tile_loadd(4, digits, LINE);
    for (uint32_t at = 0; at < dim; at += BLOCK) {
        const uint8_t *block = codes + at / BLOCK * BLOCK_BYTES;
        if (kvd_codec_bits(codec) == 4)
            v_products(true, block, dim, from, rows, acc + at);
        else
            v_products(false, block, dim, from, rows, acc + at);
    }
}

void kvd_amx_v_reduce(uint32_t codec, const float *acc, uint32_t dim, float *o)
{
    if (!digits_take(codec, dim, true)) {
        kvd_cpu_avx512.v_reduce(codec, acc, dim, o);
        return;
    }
    for (uint32_t i = 0; i < dim; i++) {
        uint32_t half = i % BLOCK / 64, slot = i % 64 / 16, g = i % 16 / 4;
        uint32_t channel = (slot + 4 * (i & 1)) * 16 + half * 4 + g + 8 * (i >> 1 & 1);
        o[i / BLOCK * BLOCK + channel] = acc[i];
    }
}

// Scores of keys in tc2 and tc2.5 (digits_tc.h), for amx.c.
//
// A pair is eight rows of a right operand. What the centre of all levels takes off a product is
// where sums begin.

// Of a chunk's piece, words as k_rows has them; or, of pieces with fewer than 16 bytes a lane, the
// ones that hold what those would, other registers' bits beside it.
static inline void tc_rows(uint32_t lane, const uint8_t *piece, __m512i out[8])
{
    const __m512i eights =
                      _mm512_setr_epi32(0, 0, 8, 8, 16, 16, 24, 24, 0, 0, 8, 8, 16, 16, 24, 24),
                  fours =
                      _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    __m512i x[4];
    if (lane == 16) {
        k_rows(piece, out);
        return;
    }
    for (int i = 0; i < (lane == 8 ? 4 : 2); i++) {
        const void *at = piece + 16 * KVD_MIN(lane, 4u) * (uint32_t)i;
        x[i] = lane >= 4   ? _mm512_loadu_si512(at)
               : lane == 2 ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(at))
                           : _mm512_cvtepu8_epi32(_mm_loadu_si128(at));
    }
    for (int i = 0; i < 8; i++) {
        __m512i from =
            _mm512_add_epi32(lane == 8 ? eights : fours, _mm512_set1_epi32(lane == 8 ? i : i / 2));
        out[i] = _mm512_permutex2var_epi32(x[0], from, x[1]);
        if (lane == 8)
            out[i] = _mm512_mask_blend_epi32(0xff00, out[i],
                                             _mm512_permutex2var_epi32(x[2], from, x[3]));
    }
}

// to: the right operands of the chunk, of two pairs each.
static void tc_unpack(const struct tc_plan *p, const uint8_t *chunk, uint8_t (*to)[16][LINE])
{
    for (uint32_t i = 0, pair = 0; i < p->n_pieces; i++) {
        __m512i words[8];
        tc_rows(p->piece[i].lane, chunk + KVD_LANES * p->piece[i].before, words);
        for (uint32_t end = pair + p->piece[i].pairs; pair < end; pair++) {
            __m512i from[2] = {_mm512_set1_epi64((long long)p->pair[pair].from[0]),
                               _mm512_set1_epi64((long long)p->pair[pair].from[1])};
            __m512i mask = _mm512_set1_epi32((int)p->pair[pair].mask);
            for (uint32_t row = 0; row < 8; row++)
                _mm512_store_si512(
                    to[pair / 2][pair % 2 * 8 + row],
                    _mm512_and_si512(_mm512_multishift_epi64_epi8(from[row % 2], words[row]),
                                     mask));
        }
    }
    SEEN();
}

// A last pair that is alone meets zeros with whatever lies beside it.
#define TC_CHUNK(n)                                                                                \
    _tile_loadd(n, start, LINE);                                                                   \
    for (uint32_t i = 0; i < tiles; i++) {                                                         \
        _tile_loadd(4, (const uint8_t *)q + i * LINE, 2 * t->dim);                                 \
        _tile_loadd(6, b[(n)*tiles + i], LINE);                                                    \
        _tile_dpbsud(n, 4, 6);                                                                     \
    }

void kvd_amx_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                       uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    kvd_cpu_ask(ahead, KVD_LOOP_ASKS);
    const struct tc_plan *p = (const void *)((const uint8_t *)q + DIGITS * 2 * t->dim);
    uint32_t tiles = (p->n_pairs + 1) / 2, bytes = kvd_tc_codes_bytes(t) / 4;
    _Alignas(LINE) uint8_t b[4 * MOST_PAIRS / 2][16][LINE];
    _Alignas(LINE) int32_t c[4][4 * LINES][16], start[4 * LINES][16];
    float from[KVD_CPU_ROWS];
    for (uint32_t r = 0; r < rows; r++) {
        const struct tc_tail *tail = tc_tail_of((float *)(uintptr_t)(q + r * 2 * t->dim), t->dim);
        for (uint32_t d = 0; d < DIGITS; d++)
            _mm512_store_si512(start[r * LINES + d], _mm512_set1_epi32(tail->start[d]));
        from[r] = tail->from;
    }
    tc_unpack(p, codes, b);
    tc_unpack(p, codes + bytes, b + tiles);
    TC_CHUNK(0)
    tc_unpack(p, codes + 2 * bytes, b + 2 * tiles);
    TC_CHUNK(1)
    tc_unpack(p, codes + 3 * bytes, b + 3 * tiles);
    TC_CHUNK(2)
    TC_CHUNK(3)
    k_store(c);
    k_sums(c, from, rows, scores);
}

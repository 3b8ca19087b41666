// Scores of keys in tc2 and tc2.5 (digits_tc.h), for vnni.c. Bytes that begin at any bit are an
// instruction of VBMI, which the first processors with VNNI do not have.
#define VBMI __attribute__((target("avx512vbmi")))

// A tile's queries by pair, spread over the lanes of a group, tokens g and g + 8 side by side; and
// what the centre takes from each lane's sum.
struct tc_lines {
    __m512i x[MOST_PAIRS][KVD_CPU_ROWS][DIGITS], centre[KVD_CPU_ROWS];
};

static void tc_spread(const struct tc_plan *p, const float *q, uint32_t dim, uint32_t rows,
                      struct tc_lines *to)
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (uint32_t r = 0; r < rows; r++) {
        __m512i sum = _mm512_setzero_si512();
        for (uint32_t d = DIGITS; d-- > 0;) {
            const uint8_t *line = (const uint8_t *)q + (r * 4 + d) * 2 * dim;
            sum = _mm512_slli_epi32(sum, 8);
            for (uint32_t i = 0; i < p->n_pairs; i++) {
                __m256i pair =
                    _mm256_loadu_si256((const __m256i *)(const void *)(line + i * PAIR_BYTES));
                to->x[i][r][d] = _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(pair));
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32((int)(p->pair[i].mask >> 1)),
                                          to->x[i][r][d]);
            }
        }
        to->centre[r] = sum;
    }
}

// A group's words of a piece of `lane` bytes a lane: those that hold each lane's registers.
static inline __m512i tc_words(uint32_t lane, const uint8_t *piece, uint32_t group)
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                  fourfold = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const void *at = piece + group * 4 * lane;
    uint32_t word;
    switch (lane) {
    case 16:
        return _mm512_loadu_si512(at);
    case 8:
        return _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(_mm256_loadu_si256(at)));
    case 4:
        return _mm512_permutexvar_epi32(fourfold, _mm512_castsi128_si512(_mm_loadu_si128(at)));
    case 2:
        return _mm512_permutexvar_epi32(
            fourfold, _mm512_castsi128_si512(_mm_cvtepu16_epi32(_mm_loadl_epi64(at))));
    default:
        memcpy(&word, at, sizeof(word));
        return _mm512_permutexvar_epi32(
            fourfold, _mm512_castsi128_si512(_mm_cvtepu8_epi32(_mm_cvtsi32_si128((int)word))));
    }
}

// Adds up two rows' products over some groups' lanes, added in pairs of groups.
VBMI static KVD_BY_CASE void tc_groups(const uint32_t rows, const struct tc_plan *p,
                                       const uint8_t *chunk, uint32_t group,
                                       const struct tc_lines *lines, uint32_t row,
                                       __m512 halves[PAIR][GROUPS / 2])
{
    __m512i sum[GROUPS][PAIR][DIGITS];
    for (uint32_t n = 0; n < GROUPS; n++)
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t d = 0; d < DIGITS; d++)
                sum[n][r][d] = _mm512_setzero_si512();
    for (uint32_t i = 0, pair = 0; i < p->n_pieces; i++) {
        const uint8_t *piece = chunk + KVD_LANES * p->piece[i].before;
        for (uint32_t end = pair + p->piece[i].pairs; pair < end; pair++) {
            __m512i from =
                _mm512_broadcast_i64x2(_mm_loadu_si128((const void *)p->pair[pair].from));
            __m512i mask = _mm512_set1_epi32((int)p->pair[pair].mask), x[GROUPS];
            for (uint32_t n = 0; n < GROUPS; n++) {
                __m512i w = tc_words(p->piece[i].lane, piece, group + n);
                x[n] = _mm512_and_si512(_mm512_multishift_epi64_epi8(from, w), mask);
            }
            for (uint32_t r = 0; r < rows; r++)
                for (uint32_t d = 0; d < DIGITS; d++) {
                    __m512i q = lines->x[pair][row + r][d];
                    LOADED(q);
                    for (uint32_t n = 0; n < GROUPS; n++)
                        sum[n][r][d] = _mm512_dpbusd_epi32(sum[n][r][d], x[n], q);
                }
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t n = 0; n < GROUPS; n += 2) {
            __m512 all[2];
            for (uint32_t m = 0; m < 2; m++) {
                const __m512i *digit = sum[n + m][r];
                __m512i s = _mm512_add_epi32(_mm512_slli_epi32(digit[2], 8), digit[1]);
                s = _mm512_add_epi32(_mm512_slli_epi32(s, 8), digit[0]);
                all[m] = _mm512_cvtepi32_ps(_mm512_sub_epi32(s, lines->centre[row + r]));
            }
            halves[r][n / 2] = fold_halves(all[0], all[1]);
        }
}

VBMI static KVD_BY_CASE void tc_rows(const struct kvd_tc_coder *t, const uint8_t *codes,
                                     const float *q, uint32_t rows, float *scores,
                                     struct kvd_cpu_ahead *ahead)
{
    const struct tc_plan *p = (const void *)((const uint8_t *)q + DIGITS * 2 * t->dim);
    struct tc_lines lines;
    tc_spread(p, q, t->dim, rows, &lines);
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        __m512 halves[8 / GROUPS][KVD_CPU_ROWS][GROUPS / 2];
        const uint8_t *at = codes + chunk * (kvd_tc_codes_bytes(t) / 4);
        for (uint32_t i = 0; i < 8 / GROUPS; i++) {
            uint32_t r = 0;
            kvd_cpu_ask(ahead, 1);
            for (; r + PAIR <= rows; r += PAIR)
                tc_groups(PAIR, p, at, i * GROUPS, &lines, r, &halves[i][r]);
            if (r < rows)
                tc_groups(1, p, at, i * GROUPS, &lines, r, &halves[i][r]);
        }
        for (uint32_t r = 0; r < rows; r++) {
            __m512 all[4] = {halves[0][r][0], halves[0][r][1], halves[1][r][0], halves[1][r][1]};
            float from = tc_tail_of((float *)(uintptr_t)(q + r * 2 * t->dim), t->dim)->from;
            _mm512_storeu_ps(scores + r * KVD_PAGE_TOKENS + chunk * 16,
                             _mm512_mul_ps(fold(all), _mm512_set1_ps(from)));
        }
    }
}

VBMI void kvd_vnni_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                             uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    if (!takes_tc())
        kvd_cpu_avx512.tc_scores(t, codes, q, rows, scores, ahead);
    else
        tc_rows(t, codes, q, rows, scores, ahead);
}

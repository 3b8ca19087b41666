// Scores of keys in tc2 and tc2.5, whose channel tiles have codes of any width (tc.h), for vnni.c.
//
// Two channel tiles that have codes are a *pair*. Once taken out of the stream and doubled, its
// codes lie as int2's at a slot of a block do, and all that follows is k_sums'. What one piece of
// the stream has of a pair is taken by bytes that begin at any bit, so that each code comes to its
// place at once, and what is beside it is masked. Such bytes are an instruction of VBMI, which the
// first processors with VNNI do not have.
#define VBMI __attribute__((target("avx512vbmi")))

enum {
    MOST_PAIRS = KVD_TC_MAX_TILES / 2,
    MOST_PIECES = 5, // of 16, 8, 4, 2 and 1 bytes a lane; or two of 16 and one more
    NO_TILE = 0xff,
};

// What a piece has of the two tiles of a pair: where doubled codes begin, and which bits are
// theirs.
struct tc_take {
    uint8_t bit[2], mask[2];
};

// Pieces of a stream: bytes a lane, bits of the stream before each.
struct tc_pieces {
    uint32_t n, lane[MOST_PIECES], before[MOST_PIECES];
};

static inline struct tc_pieces tc_pieces_of(const struct kvd_tc_coder *t)
{
    struct tc_pieces p = {0};
    uint32_t all = kvd_tc_codes_bytes(t) / 128;
    for (uint32_t lane = 16, before = 0; before < all; before += lane) {
        while (before + lane > all)
            lane /= 2;
        p.lane[p.n] = lane;
        p.before[p.n++] = before;
    }
    return p;
}

static uint32_t tc_pairs(const struct kvd_tc_coder *t)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < t->dim / KVD_TC_TILE; i++)
        n += t->bits[i] > 0;
    return (n + 1) / 2;
}

// A row is, of each block of up to SLOTS pairs, lines of digits as k_sums wants them; then of each
// block what the centre takes from the sums of lanes 2i and 2i + 1; then what products are worth;
// then, of the first row for all, what each piece has of each pair. At head_dim 80 that fills its 2
// * dim floats but for one.
static const int32_t *tc_centres(const float *row, uint32_t pairs)
{
    return (const void *)((const uint8_t *)row + pairs * DIGITS * LINE);
}

static const float *tc_from(const float *row, uint32_t pairs)
{
    return (const void *)(tc_centres(row, pairs) + (pairs + SLOTS - 1) / SLOTS * 8);
}

static const struct tc_take *tc_takes(const float *row, uint32_t pairs)
{
    return (const void *)(tc_from(row, pairs) + 1);
}

// What a piece has of some tiles, of which the second may not be there.
static struct tc_take tc_take_of(const struct kvd_tc_coder *t, const uint8_t tile[2], uint32_t lane,
                                 uint32_t before)
{
    struct tc_take take = {0};
    for (uint32_t side = 0; side < 2 && tile[side] != NO_TILE; side++) {
        uint32_t at = 0;
        for (uint32_t i = 0; i < tile[side]; i++)
            at += t->bits[i];
        uint32_t lo = KVD_MAX(at, before), hi = KVD_MIN(at + t->bits[tile[side]], before + lane);
        if (lo >= hi)
            continue;
        take.bit[side] = (uint8_t)(at - before - 1); // doubled, the code begins a bit earlier
        take.mask[side] = (uint8_t)(((1u << (hi - lo)) - 1) << (lo - at + 1));
    }
    return take;
}

// A pair's numbers in the order of its codes, and twice the centre of these, as they lie in lanes.
static void tc_spread(const struct kvd_tc_coder *t, const float *q, const uint8_t tile[2],
                      float x[LINE], uint8_t centre[LINE])
{
    for (uint32_t i = 0; i < LINE; i++) {
        uint32_t r = i % 16 / 4, from = tile[i & 1];
        x[i] =
            from == NO_TILE ? 0 : q[from * KVD_TC_TILE + i / 16 * 2 + 8 * (r >> 1) + (i % 4 >> 1)];
        centre[i] = (uint8_t)(from == NO_TILE ? 0 : (1u << t->bits[from]) - 1);
    }
}

static void tc_prepare(const struct kvd_tc_coder *t, const float *q, float *out)
{
    uint8_t tile[MOST_PAIRS][2];
    for (uint32_t i = 0, n = 0; i < t->dim / KVD_TC_TILE; i++)
        if (t->bits[i]) {
            tile[n / 2][n & 1] = (uint8_t)i;
            tile[n / 2][1] = n & 1 ? (uint8_t)i : NO_TILE;
            n++;
        }
    struct digit_scale s = digit_scale_of_row(q, t->dim);
    struct tc_pieces pieces = tc_pieces_of(t);
    uint32_t pairs = tc_pairs(t);
    memset(out, 0, 2 * t->dim * sizeof(float));
    *(float *)(uintptr_t)tc_from(out, pairs) = s.from;
    for (uint32_t pair = 0; pair < pairs; pair++) {
        uint32_t block = pair / SLOTS, slots = KVD_MIN(pairs - block * SLOTS, SLOTS);
        uint8_t *line = (uint8_t *)out + block * SLOTS * DIGITS * LINE + pair % SLOTS * LINE;
        struct tc_take *take = (struct tc_take *)(uintptr_t)tc_takes(out, pairs);
        int32_t *centre = (int32_t *)(uintptr_t)tc_centres(out, pairs) + block * 8;
        float x[LINE];
        uint8_t c[LINE];
        for (uint32_t i = 0; i < pieces.n; i++)
            take[i * pairs + pair] = tc_take_of(t, tile[pair], pieces.lane[i], pieces.before[i]);
        tc_spread(t, q, tile[pair], x, c);
        digit_lines_of(x, LINE, s.to, slots * LINE, line);
        for (uint32_t i = 0; i < DIGITS * LINE; i++) {
            uint32_t d = i / LINE, byte = i % LINE;
            if (byte % 8 < 4) // the other four are the next lane's, and the same
                centre[byte / 8] +=
                    (int32_t)c[byte] * (int8_t)line[d * slots * LINE + byte] * (1 << (8 * d));
        }
    }
}

// Words of groups' lanes, register by register; smaller pieces have two neighbours' or four's in
// one.
static KVD_BY_CASE void tc_words(uint32_t lane, const uint8_t *at, __m512i w[GROUPS])
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7),
                  fourfold = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    if (lane == 16) {
        for (uint32_t n = 0; n < GROUPS; n++)
            w[n] = _mm512_loadu_si512(at + n * 64);
        return;
    }
    for (uint32_t n = 0; n < GROUPS; n++, at += 4 * lane) {
        uint32_t word;
        __m128i four;
        if (lane == 8) {
            __m256i eight = _mm256_loadu_si256((const void *)at);
            w[n] = _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(eight));
            continue;
        }
        if (lane == 4)
            four = _mm_loadu_si128((const void *)at);
        else if (lane == 2)
            four = _mm_cvtepu16_epi32(_mm_loadl_epi64((const void *)at));
        else
            four = _mm_cvtepu8_epi32(
                _mm_cvtsi32_si128((int)*(const uint32_t *)memcpy(&word, at, sizeof(word))));
        w[n] = _mm512_permutexvar_epi32(fourfold, _mm512_castsi128_si512(four));
    }
}

// Where the bytes of two neighbouring words begin, those of registers 0 and 1 and of 2 and 3, for a
// tile at bit 0 of the piece.
static inline __m128i tc_begin(uint32_t lane)
{
    static const uint8_t begin[5][16] = {
        {0, 0, 4, 4, 33, 33, 37, 37, 2, 2, 6, 6, 35, 35, 39, 39},
        {0, 0, 8, 8, 34, 34, 42, 42, 4, 4, 12, 12, 38, 38, 46, 46},
        {0, 0, 16, 16, 36, 36, 52, 52, 8, 8, 24, 24, 44, 44, 60, 60},
        {0, 0, 16, 16, 40, 40, 56, 56, 0, 0, 16, 16, 40, 40, 56, 56},
        {0, 0, 16, 16, 32, 32, 48, 48, 0, 0, 16, 16, 32, 32, 48, 48},
    };
    return _mm_loadu_si128((const void *)begin[__builtin_ctz(lane)]);
}

// A tile's plan: of each piece and pair where bytes begin, and the mask, 0: it has nothing of it.
struct tc_plan {
    struct tc_pieces pieces;
    uint32_t pairs;
    bool late[MOST_PIECES][MOST_PAIRS / SLOTS]; // a piece has nothing of a block's first two pairs
    uint32_t mask[MOST_PIECES * MOST_PAIRS];
    __m128i from[MOST_PIECES * MOST_PAIRS];
};

static void tc_plan_of(const struct kvd_tc_coder *t, const float *q, struct tc_plan *p)
{
    p->pieces = tc_pieces_of(t);
    p->pairs = tc_pairs(t);
    const struct tc_take *take = tc_takes(q, p->pairs);
    for (uint32_t i = 0, at = 0; i < p->pieces.n; i++)
        for (uint32_t pair = 0; pair < p->pairs; pair++, at++) {
            int16_t bit, mask;
            memcpy(&bit, take[at].bit, sizeof(bit));
            memcpy(&mask, take[at].mask, sizeof(mask));
            p->from[at] = _mm_add_epi8(tc_begin(p->pieces.lane[i]), _mm_set1_epi16(bit));
            p->mask[at] = (uint16_t)mask * 0x10001u;
            if (pair % SLOTS < 2)
                p->late[i][pair / SLOTS] = (pair % SLOTS == 0 || p->late[i][pair / SLOTS]) && !mask;
        }
}

// Begins with what a piece has of the doubled codes of some pairs, of some groups from `group` on,
// or adds it.
VBMI static KVD_BY_CASE void tc_piece(const bool first, const uint32_t slot, const uint32_t slots,
                                      const struct tc_plan *p, uint32_t piece, uint32_t pair,
                                      const uint8_t *chunk, uint32_t group,
                                      __m512i x[GROUPS][SLOTS])
{
    const uint32_t lane = p->pieces.lane[piece], at = piece * p->pairs + pair;
    __m512i w[GROUPS];
    tc_words(lane, chunk + KVD_LANES * p->pieces.before[piece] + group * 4 * lane, w);
    for (uint32_t i = slot; i < slots; i++) {
        __m512i from = _mm512_broadcast_i64x2(p->from[at + i]),
                mask = _mm512_set1_epi32((int)p->mask[at + i]);
        for (uint32_t n = 0; n < GROUPS; n++) {
            __m512i y = _mm512_multishift_epi64_epi8(from, w[n]);
            x[n][i] = first ? _mm512_and_si512(y, mask)
                            : _mm512_ternarylogic_epi32(x[n][i], y, mask, 0xf8);
        }
    }
}

// Rows' centres, of each block, as lanes want them.
struct tc_centres {
    __m512i x[KVD_CPU_ROWS][MOST_PAIRS / SLOTS];
    float from[KVD_CPU_ROWS];
};

static void tc_centres_of(const struct tc_plan *p, const float *q, uint32_t stride, uint32_t rows,
                          struct tc_centres *c)
{
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    for (uint32_t r = 0; r < rows; r++) {
        const int32_t *at = tc_centres(q + r * stride, p->pairs);
        for (uint32_t i = 0; i * SLOTS < p->pairs; i++) {
            __m256i eight = _mm256_loadu_si256((const void *)(at + 8 * i));
            c->x[r][i] = _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(eight));
        }
        c->from[r] = *tc_from(q + r * stride, p->pairs);
    }
}

// Adds a block's products to a chunk's scores, or begins with them.
VBMI static KVD_BY_CASE void tc_chunk(const uint32_t slots, const uint32_t rows,
                                      const struct tc_plan *p, uint32_t block, const uint8_t *chunk,
                                      const uint8_t *q, uint32_t stride, const struct tc_centres *c,
                                      float *scores, struct kvd_cpu_ahead *ahead)
{
    __m512 halves[8 / GROUPS][KVD_CPU_ROWS][GROUPS / 2];
    const uint32_t pair = block * SLOTS;
    for (uint32_t half = 0; half < 8 / GROUPS; half++) {
        __m512i x[GROUPS][SLOTS];
        kvd_cpu_ask(ahead, block == 0);
        tc_piece(true, 0, slots, p, 0, pair, chunk, half * GROUPS, x);
        for (uint32_t i = 1; i < p->pieces.n; i++)
            if (slots > 2 && p->late[i][block])
                tc_piece(false, 2, slots, p, i, pair, chunk, half * GROUPS, x);
            else
                tc_piece(false, 0, slots, p, i, pair, chunk, half * GROUPS, x);
        for (uint32_t r = 0; r < rows; r += PAIR) {
            const uint32_t some = KVD_MIN(rows - r, PAIR);
            __m512i sum[GROUPS][PAIR];
            LOAD_AGAIN(q);
            k_sums(slots, some, x, q + r * stride, stride, sum);
            for (uint32_t i = 0; i < some; i++)
                k_halves(sum, i, c->x[r + i][block], halves[half][r + i]);
        }
    }
    for (uint32_t r = 0; r < rows; r++)
        k_store(halves[0][r], halves[1][r], c->from[r], block > 0, scores + r * KVD_PAGE_TOKENS);
}

VBMI static KVD_BY_CASE void tc_rows(const uint32_t rows, const struct kvd_tc_coder *t,
                                     const uint8_t *codes, const float *q, float *scores,
                                     struct kvd_cpu_ahead *ahead)
{
    struct tc_plan p;
    struct tc_centres c;
    const uint32_t stride = 8 * t->dim, bytes = kvd_tc_codes_bytes(t) / 4;
    tc_plan_of(t, q, &p);
    tc_centres_of(&p, q, 2 * t->dim, rows, &c);
    for (uint32_t i = 0; i < 4; i++)
        for (uint32_t block = 0; block * SLOTS < p.pairs; block++) {
            const uint8_t *chunk = codes + i * bytes,
                          *lines = (const uint8_t *)q + block * SLOTS * DIGITS * LINE;
            float *to = scores + i * 16;
            switch (KVD_MIN(p.pairs - block * SLOTS, SLOTS)) {
            case 4:
                tc_chunk(4, rows, &p, block, chunk, lines, stride, &c, to, ahead);
                break;
            case 3:
                tc_chunk(3, rows, &p, block, chunk, lines, stride, &c, to, ahead);
                break;
            case 2:
                tc_chunk(2, rows, &p, block, chunk, lines, stride, &c, to, ahead);
                break;
            default:
                tc_chunk(1, rows, &p, block, chunk, lines, stride, &c, to, ahead);
            }
        }
}

VBMI void kvd_vnni_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                             uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    if (!takes_tc()) {
        kvd_cpu_avx512.tc_scores(t, codes, q, rows, scores, ahead);
        return;
    }
    if (rows == 4)
        tc_rows(4, t, codes, q, scores, ahead);
    else if (rows == 3)
        tc_rows(3, t, codes, q, scores, ahead);
    else if (rows == 2)
        tc_rows(2, t, codes, q, scores, ahead);
    else
        tc_rows(1, t, codes, q, scores, ahead);
}

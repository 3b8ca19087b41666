// Scores of keys in tc2 and tc2.5, for simd.inc.h.
enum {
    STREAM_BYTES = 4 * 128 * 4, // a word for each lane and register of a tile's four chunks
    TC_WINDOW = 24, // where the second word of a stream begins that has more than 32 bits
};

// A tile's streams (tc.h), each joined from its pieces to a word a lane and register, in copies
// that are shifted by what codes of the plan need beyond whole bytes.
struct tc_copies {
    _Alignas(64) uint8_t x[8 * (4 * STREAM_BYTES + 64)];
};

// The pieces of K's stream in a chunk, its channel tiles in runs of one width, and where in copies
// their codes are.
struct tc_plan {
    uint32_t dim, pieces, runs;
    uint32_t windows;                // words of first elements; 0: first and second share one
    uint32_t stride, second, copies; // bytes from copy to copy and to second elements
    uint32_t shift[8];               // of each copy
    struct {
        uint32_t lane, before; // bytes a lane, bits of the stream before it
    } piece[8];
    struct {
        uint32_t bits, tile, tiles;
    } run[KVD_TC_MAX_TILES];
    uint32_t place[KVD_TC_MAX_TILES];
};

// The copy with such a shift.
static uint32_t tc_copy(struct tc_plan *p, uint32_t shift)
{
    uint32_t i = 0;
    while (i < p->copies && p->shift[i] != shift)
        i++;
    p->shift[i] = shift;
    p->copies = KVD_MAX(p->copies, i + 1);
    return i;
}

static struct tc_plan tc_plan_of(const struct kvd_tc_coder *t)
{
    struct tc_plan p = {.dim = t->dim, .copies = 1};
    uint32_t all = 0, at[KVD_TC_MAX_TILES];
    for (uint32_t i = 0; i < t->dim / 16; all += t->bits[i++]) {
        at[i] = all;
        if (t->bits[i] == 0)
            continue;
        if (p.runs && p.run[p.runs - 1].bits == t->bits[i] && t->bits[i] == t->bits[i - 1])
            p.run[p.runs - 1].tiles++;
        else
            p.run[p.runs++] = (__typeof__(p.run[0])){t->bits[i], i, 1};
    }
    for (uint32_t lane = 16, before = 0; before < all; before += lane) {
        while (before + lane > all)
            lane /= 2;
        p.piece[p.pieces++] = (__typeof__(p.piece[0])){lane, before};
    }
    p.windows = all == 16 ? 0 : all <= 32 ? 1 : 2;
    p.second = all == 16 ? 2 : STREAM_BYTES;
    p.stride = (all == 16 ? 1 : 2 * p.windows) * STREAM_BYTES + 64;
    for (uint32_t i = 0; i < t->dim / 16; i++) {
        bool late = p.windows == 2 && at[i] >= TC_WINDOW;
        uint32_t bit = at[i] - (late ? TC_WINDOW : 0);
        if (t->bits[i])
            p.place[i] = tc_copy(&p, bit % 8) * p.stride + (late ? 2 * STREAM_BYTES : 0) + bit / 8;
    }
    return p;
}

// Takes up a piece of a tile's streams, of `lane` bytes a lane.
static KVD_BY_CASE void tc_join(const uint32_t lane, const uint8_t *piece, uint32_t chunk_bytes,
                                uint32_t before, uint8_t *to)
{
    for (uint32_t at = 0; at < 32 * G; at++, to += 4 * V) {
        struct plane_words w = {piece + at / (8 * G) * chunk_bytes + at / G % 8 * 4 * lane, 0,
                                lane};
        vi x = load_words(&w, (int)(at % G)), y = v_low(v_right(x, half_of(&w)), lane);
        x = v_low(x, lane);
        if (before % 32) {
            x = v_or(v_words(to), v_left(x, before % 32));
            y = v_or(v_words(to + STREAM_BYTES), v_left(y, before % 32));
        }
        v_words_store(to, x);
        v_words_store(to + STREAM_BYTES, y);
    }
}

static void tc_joins(const struct tc_plan *p, const uint8_t *codes, uint32_t chunk_bytes,
                     uint8_t *to)
{
    for (uint32_t n = 0; n < p->pieces; n++) {
        uint32_t before = p->piece[n].before;
        const uint8_t *piece = codes + KVD_LANES * before;
        uint8_t *word = to + before / 32 * 2 * STREAM_BYTES;
        switch (p->piece[n].lane) {
        case 16:
            tc_join(16, piece, chunk_bytes, before, word);
            break;
        case 8:
            tc_join(8, piece, chunk_bytes, before, word);
            break;
        case 4:
            tc_join(4, piece, chunk_bytes, before, word);
            break;
        case 2:
            tc_join(2, piece, chunk_bytes, before, word);
            break;
        default:
            tc_join(1, piece, chunk_bytes, before, word);
        }
    }
    for (uint32_t at = 0; p->windows == 2 && at < 2 * STREAM_BYTES; at += 4 * V) {
        vi late = v_left(v_words(to + 2 * STREAM_BYTES + at), 32 - TC_WINDOW);
        v_words_store(to + 2 * STREAM_BYTES + at, v_or(v_right(v_words(to + at), TC_WINDOW), late));
    }
}

static void tc_copies_of(const struct tc_plan *p, const uint8_t *codes, uint32_t chunk_bytes,
                         struct tc_copies *to)
{
    for (uint32_t at = 0; p->windows == 0 && at < STREAM_BYTES; at += 4 * V)
        v_words_store(to->x + at, v_words(codes + at));
    if (p->windows > 0)
        tc_joins(p, codes, chunk_bytes, to->x);
    for (uint32_t copy = 1; copy < p->copies; copy++)
        for (uint32_t at = 0; at < p->stride - 64; at += 4 * V)
            v_words_store(to->x + copy * p->stride + at,
                          v_right(v_words(to->x + at), p->shift[copy]));
}

// Adds the products of a run's channel tiles. x: the first copy, from the first group's words on.
static KVD_BY_CASE void tc_run(const uint32_t bits, const struct tc_plan *p, uint32_t run,
                               const uint8_t *x, const float *q, const uint32_t rows,
                               vf acc[PAIR][KVD_CPU_ROWS])
{
    vf table = v_centred(bits);
    uint32_t end = p->run[run].tile + p->run[run].tiles;
    for (uint32_t tile = p->run[run].tile; tile < end; tile++)
        for (uint32_t high = 0; high < 2; high++) {
            const uint8_t *at = x + p->place[tile] + high * p->second;
            vf level[PAIR];
            for (uint32_t n = 0; n < PAIR; n++)
                level[n] = v_level(bits, table, v_words(at + n * 64));
            for (uint32_t r = 0; r < rows; r++) {
                vf y = v_load(q + r * 2 * p->dim + tile * 32 + high * 16);
                LOADED(y);
                for (uint32_t n = 0; n < PAIR; n++)
                    acc[n][r] = v_fma(level[n], y, acc[n][r]);
            }
        }
}

static KVD_BY_CASE void tc_scores_rows(const struct tc_plan *p, const struct tc_copies *copies,
                                       const float *q, const uint32_t rows, float *scores,
                                       struct kvd_cpu_ahead *ahead)
{
    for (uint32_t chunk = 0; chunk < 4; chunk++) {
        struct lanes lanes;
        for (uint32_t g = 0; g < 8; g += PAIR) {
            if (g % 4 == 0)
                kvd_cpu_ask(ahead, 1);
            vf acc[PAIR][KVD_CPU_ROWS];
            for (uint32_t n = 0; n < PAIR; n++)
                for (uint32_t r = 0; r < rows; r++)
                    acc[n][r] = v_zero();
            for (int i = 0; i < G; i++) {
                const uint8_t *x = copies->x + (chunk * 8 + g) * 64 + i * V * 4;
                for (uint32_t run = 0; run < p->runs; run++)
                    if (p->run[run].bits == 1)
                        tc_run(1, p, run, x, q + i * V, rows, acc);
                    else if (p->run[run].bits == 2)
                        tc_run(2, p, run, x, q + i * V, rows, acc);
                    else if (p->run[run].bits == 3)
                        tc_run(3, p, run, x, q + i * V, rows, acc);
                    else
                        tc_run(4, p, run, x, q + i * V, rows, acc);
            }
            lanes_put(&lanes, PAIR, rows, g, acc);
        }
        lanes_fold(&lanes, PAIR, rows, scores + chunk * 16);
    }
}

static void simd_tc_scores(const struct kvd_tc_coder *t, const uint8_t *codes, const float *q,
                           uint32_t rows, float *scores, struct kvd_cpu_ahead *ahead)
{
    struct tc_plan p = tc_plan_of(t);
    struct tc_copies copies;
    tc_copies_of(&p, codes, kvd_tc_codes_bytes(t) / 4, &copies);
    if (rows == 4)
        tc_scores_rows(&p, &copies, q, 4, scores, ahead);
    else if (rows == 3)
        tc_scores_rows(&p, &copies, q, 3, scores, ahead);
    else if (rows == 2)
        tc_scores_rows(&p, &copies, q, 2, scores, ahead);
    else
        tc_scores_rows(&p, &copies, q, 1, scores, ahead);
}

// The inner loops of attention over latents (latent.c) over vectors of V floats, for simd.inc.h.
// Lanes are query rows, of which there are many, and every value of a token is broadcast to them:
// neither scores nor sums need to be added across lanes, and values may lie in any order.

enum {
    R = KVD_LATENT_ROWS,
    PANEL_TOKENS = V == 16 ? 8 : 4, // by two vectors of rows: accumulators that fit the registers
    PANEL_PAIRS = PANEL_TOKENS / 2,
    PANEL_CHANNELS = 64, // whose queries stay in the nearest cache while all tokens pass
};

static void simd_bf16_row(const uint8_t *row, uint32_t dim, float *x)
{
    for (uint32_t c = 0; c < dim; c += V)
        v_store(x + c, v_bf16(row + 2 * c));
}

// Some channel tiles of all tokens. A vector's lanes are tokens of a chunk and two channels.
static KVD_BY_CASE void unpack_tiles(const uint32_t lane, const uint32_t more_lane,
                                     const uint32_t tiles, uint32_t tile, const uint32_t kind,
                                     const struct levels *l, const struct codes *codes,
                                     uint32_t dim, const float *scale, const float *centre,
                                     float *x)
{
    for (uint32_t at = 0; at < 32; at++) {
        uint32_t g = at / 4, chunk = at % 4;
        struct code_words where = words_of(kind, lane, more_lane, codes, dim, chunk, tile, g);
        for (int i = 0; i < G; i++) {
            struct tile_words w = load_tile(kind, &where, i);
            for (uint32_t s = 0; s < tiles; s++)
                for (uint32_t e = 0; e < 2; e++) {
                    uint32_t in = chunk * 32 + e * 16 + (uint32_t)(i * V);
                    vf level = level_of(kind, l, &where, &w, s, e);
                    v_store(x + ((tile + s) * 8 + g) * 2 * KVD_PAGE_TOKENS + in,
                            v_fma(level, v_load(scale + in), v_load(centre + in)));
                }
        }
    }
}

static KVD_BY_CASE void unpack_kind(const uint32_t kind, struct levels l, const uint8_t *codes,
                                    uint32_t dim, const float *scale, const float *centre, float *x)
{
    struct codes plain = codes_plain(codes, dim); // each is unpacked once
    EACH_TILES(unpack_tiles, dim, kind, &l, &plain, dim, scale, centre, x);
}

static void simd_latent_unpack(uint32_t codec, const uint8_t *codes, uint32_t dim,
                               const struct kvd_affine *param, float *x)
{
    uint32_t bits = kvd_codec_bits(codec);
    float scale[2 * KVD_PAGE_TOKENS] __attribute__((aligned(64)));
    float centre[2 * KVD_PAGE_TOKENS] __attribute__((aligned(64)));
    for (uint32_t i = 0; i < 2 * KVD_PAGE_TOKENS; i++) {
        scale[i] = param[kvd_latent_token(i / 2)].scale;
        centre[i] = param[kvd_latent_token(i / 2)].min;
    }
    if (bits == 4 && !kvd_codec_signed(codec))
        unpack_kind(EVEN_4, levels_of(codec), codes, dim, scale, centre, x);
    else if (bits == 2)
        unpack_kind(2, levels_of(codec), codes, dim, scale, centre, x);
    else if (bits == 3)
        unpack_kind(3, levels_of(codec), codes, dim, scale, centre, x);
    else
        unpack_kind(4, levels_of(codec), codes, dim, scale, centre, x);
}

// Scores of PANEL_TOKENS tokens over some pairs of channels.
static KVD_BY_CASE void scores_block(const float *x, const uint32_t token, const uint32_t pair,
                                     uint32_t pairs, const float *q, const uint32_t vectors,
                                     float *s)
{
    vf acc[PANEL_TOKENS][2];
    for (uint32_t t = 0; t < PANEL_TOKENS; t++)
        for (uint32_t j = 0; j < vectors; j++)
            acc[t][j] = v_zero();
    for (uint32_t p = 0; p < pairs; p++, x += pair)
        for (uint32_t e = 0; e < 2; e++, q += R) {
            vf rows[2];
            for (uint32_t j = 0; j < vectors; j++)
                rows[j] = v_load(q + j * V);
            for (uint32_t t = 0; t < PANEL_TOKENS; t++) {
                vf value = v_set1(x[t * token + e]);
                for (uint32_t j = 0; j < vectors; j++)
                    acc[t][j] = v_fma(value, rows[j], acc[t][j]);
            }
        }
    for (uint32_t t = 0; t < PANEL_TOKENS; t++)
        for (uint32_t j = 0; j < vectors; j++)
            v_store(s + t * R + j * V, v_add(v_load(s + t * R + j * V), acc[t][j]));
}

static KVD_BY_CASE void scores_of(const float *x, const uint32_t token, const uint32_t pair,
                                  uint32_t channels, uint32_t tokens, const float *q, uint32_t rows,
                                  float *s)
{
    for (uint32_t c = 0; c < channels; c += PANEL_CHANNELS)
        for (uint32_t r = 0; r < rows; r += 2 * V)
            for (uint32_t t = 0; t < tokens; t += PANEL_TOKENS) {
                const float *from = x + c / 2 * pair + t * token, *qc = q + c * R + r;
                if (rows - r > V)
                    scores_block(from, token, pair, PANEL_CHANNELS / 2, qc, 2, s + t * R + r);
                else
                    scores_block(from, token, pair, PANEL_CHANNELS / 2, qc, 1, s + t * R + r);
            }
}

// The order of codes is known when this is compiled.
static void simd_panel_scores(const struct kvd_panel *x, uint32_t channels, uint32_t tokens,
                              const float *q, uint32_t rows, float *s)
{
    if (x->pair != 2)
        scores_of(x->x, 2, 2 * KVD_PAGE_TOKENS, channels, tokens, q, rows, s);
    else
        scores_of(x->x, x->token, 2, channels, tokens, q, rows, s);
}

// Sums of PANEL_PAIRS pairs of channels over all tokens.
static KVD_BY_CASE void sums_block(const float *x, const uint32_t token, const uint32_t pair,
                                   uint32_t tokens, const float *p, const uint32_t vectors,
                                   float *o)
{
    vf acc[2 * PANEL_PAIRS][2];
    for (uint32_t c = 0; c < 2 * PANEL_PAIRS; c++)
        for (uint32_t j = 0; j < vectors; j++)
            acc[c][j] = v_zero();
    for (uint32_t t = 0; t < tokens; t++, x += token, p += R) {
        vf rows[2];
        for (uint32_t j = 0; j < vectors; j++)
            rows[j] = v_load(p + j * V);
        for (uint32_t c = 0; c < 2 * PANEL_PAIRS; c++) {
            vf value = v_set1(x[c / 2 * pair + c % 2]);
            for (uint32_t j = 0; j < vectors; j++)
                acc[c][j] = v_fma(value, rows[j], acc[c][j]);
        }
    }
    for (uint32_t c = 0; c < 2 * PANEL_PAIRS; c++)
        for (uint32_t j = 0; j < vectors; j++)
            v_store(o + c * R + j * V, v_add(v_load(o + c * R + j * V), acc[c][j]));
}

static KVD_BY_CASE void sums_of(const float *x, const uint32_t token, const uint32_t pair,
                                uint32_t channels, uint32_t tokens, const float *p, uint32_t rows,
                                float *o)
{
    for (uint32_t c = 0; c < channels; c += 2 * PANEL_PAIRS)
        for (uint32_t r = 0; r < rows; r += 2 * V) {
            const float *from = x + c / 2 * pair;
            if (rows - r > V)
                sums_block(from, token, pair, tokens, p + r, 2, o + c * R + r);
            else
                sums_block(from, token, pair, tokens, p + r, 1, o + c * R + r);
        }
}

static void simd_panel_sums(const struct kvd_panel *x, uint32_t channels, uint32_t tokens,
                            const float *p, uint32_t rows, float *o)
{
    if (x->pair != 2)
        sums_of(x->x, 2, 2 * KVD_PAGE_TOKENS, channels, tokens, p, rows, o);
    else
        sums_of(x->x, x->token, 2, channels, tokens, p, rows, o);
}

static void simd_panel_logits(float *s, uint32_t tokens, float scale, float *nan)
{
    for (uint32_t r = 0; r < R; r += V) {
        vf bad = v_zero(), by = v_set1(scale);
        for (uint32_t t = 0; t < tokens; t++) {
            vf x = v_mul(v_load(s + t * R + r), by);
            v_store(s + t * R + r, x);
            bad = v_fma(x, v_zero(), bad);
        }
        v_store(nan + r, bad);
    }
}

static void simd_panel_top(const float *s, uint32_t tokens, float *top)
{
    for (uint32_t r = 0; r < R; r += V) {
        vf most = v_load(top + r);
        for (uint32_t t = 0; t < tokens; t++)
            most = v_max(v_load(s + t * R + r), most);
        v_store(top + r, most);
    }
}

static void simd_panel_exp(float *s, uint32_t tokens, const float *top, float *sum)
{
    for (uint32_t r = 0; r < R; r += V) {
        vf all = v_zero(), minus = v_mul(v_load(top + r), v_set1(-1));
        for (uint32_t t = 0; t < tokens; t++) {
            vf x = v_exp(v_add(v_load(s + t * R + r), minus));
            v_store(s + t * R + r, x);
            all = v_add(all, x);
        }
        v_store(sum + r, all);
    }
}

static void simd_panel_scale(float *x, uint32_t n, const float *f)
{
    for (uint32_t i = 0; i < n; i++, x += R)
        for (uint32_t r = 0; r < R; r += V)
            v_store(x + r, v_mul(v_load(x + r), v_load(f + r)));
}

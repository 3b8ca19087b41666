// Rows of codecs tc2 and tc2.5, already transformed (calib/transforms.h): their codes, and where
// K's lie in a tile; V's lie as int2's. kernels/README.md specifies both.
#ifndef KVD_KERNELS_TC_H
#define KVD_KERNELS_TC_H

#include "kernels/format.h"

enum {
    KVD_TC_TILE = 16,    // channels
    KVD_TC_MAX_BITS = 4, // of a code
    KVD_TC_V_BITS = 2,   // of V's
    KVD_TC_V_REFITS = 2, // least-squares rounds of a value's scale,
    KVD_TC_K_REFITS = 1, // and of a key's
    KVD_TC_MAX_TILES = KVD_MAX_HEAD_DIM / KVD_TC_TILE,
    KVD_TC_MOST_BYTES =
        KVD_PAGE_TOKENS * KVD_MAX_HEAD_DIM * KVD_TC_MAX_BITS / 8 // of a side's codes
};

// How one side of a layer and kv head is coded.
struct kvd_tc_coder {
    const float *sigma; // [dim], deviations of channels; NULL: 1
    uint32_t dim, refits;
    bool v;                         // where codes lie differs for V
    uint8_t bits[KVD_TC_MAX_TILES]; // of codes by tile, 0 to 4
};

// That of K in `codec`, or of V, which is the same in both codecs. sigma as above. bits: [dim /
// 16], whole numbers, of the codec's sum (kvd_tc_stream_bits); NULL: as even as that sum allows,
// the first tiles having one more. Neither is looked at for V.
struct kvd_tc_coder kvd_tc_coder_of(uint32_t codec, uint32_t dim, bool v, const float *sigma,
                                    const float *bits);

// The codes of a row, 0 where a tile has none. Returns the scale as it is stored, fp16. It begins
// as rms(y / sigma) over the channels that have codes; after `refits` least-squares rounds, each
// with new codes, it is the one with which the row that is read back is as long along y as y
// itself, over those channels: sum y^2 / sum c y, c = sigma * level; 0 where the divisor is not
// above 0, saturated at 65504. Of two codes that are as near the lower one is taken.
uint16_t kvd_tc_quantize(const struct kvd_tc_coder *t, const float *y,
                         uint8_t codes[KVD_MAX_HEAD_DIM]);

// From one level to the next, in a channel's own units: sigma * step_b. 0 where it has no codes.
double kvd_tc_step(const struct kvd_tc_coder *t, uint32_t channel);
// What a channel's code means, without the token's scale: sigma * step_b (code - (2^b - 1) / 2).
double kvd_tc_value(const struct kvd_tc_coder *t, uint32_t channel, uint8_t code);

// One side's codes in a tile.
uint32_t kvd_tc_codes_bytes(const struct kvd_tc_coder *t);

// Writes a token's codes into its side's bytes of a tile, or reads them back.
void kvd_tc_pack(const struct kvd_tc_coder *t, uint8_t *side, uint32_t token, const uint8_t *codes);
void kvd_tc_unpack(const struct kvd_tc_coder *t, const uint8_t *side, uint32_t token,
                   uint8_t codes[KVD_MAX_HEAD_DIM]);

#endif

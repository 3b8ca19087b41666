// Layers that a set marks as sensitive: each is to have a codec of its own, of more bits than the
// other layers have. kvd parts a session's layout into planes by them (daemon/service/layout.h).
//
// A text has them as "LAYER=CODECS", layers ascending, with + between, such as
// "18=tc2.5+23=k=int4,v=int4"; codecs as planes have them.
//
// In a set of rotations, which serve all codecs, a marked layer has what the others have. In one of
// transforms a layer that is marked for a K in tc2 or tc2.5 has transforms for that, and one marked
// for bf16 what it would have unmarked, for whoever looks at it; one that is marked for any other K
// has rotations in the transforms' place: orthogonal, with no mean, deviations of 1 and even bits
// (kvd_layer_rotated). Their scales are unbiased for K and least squares for V, as `fit` has them.
#ifndef KVD_CALIB_MARKS_H
#define KVD_CALIB_MARKS_H

#include "calib/rotset.h"

enum { KVD_MARKS_TEXT = KVD_MAX_LAYERS * (KVD_CODECS_TEXT + 8) };

// Gives a set the marks of a text. KVD_E_INVALID says what the text lacks; what marks must hold
// to, the set being whole, is kvd_marks_check's.
int kvd_marks_parse(struct kvd_rotset *set, const char *text, struct kvd_error *err);
// Writes the text, "" without marks, and returns it.
const char *kvd_marks_text(const struct kvd_rotset *set, char text[KVD_MARKS_TEXT]);
// The mark of a layer, by its model layer id; NULL: it has none.
const struct kvd_mark *kvd_mark_of(const struct kvd_rotset *set, uint32_t layer);

// Whether the layers are the set's and, of transforms, each mark has more bits than the set's
// codec. KVD_E_INVALID names the layer that is not.
int kvd_marks_check_layers(const struct kvd_rotset *set, struct kvd_error *err);
// The same, and what is said of matrices above. KVD_E_CORRUPT.
int kvd_marks_check(const struct kvd_rotset *set, struct kvd_error *err);

// Whether a mark asks for more bits than a layer has in `codec`.
bool kvd_mark_widens(const struct kvd_mark *mark, struct kvd_codecs codec, uint32_t dim_k,
                     uint32_t dim_v);
// Bits of a value on average over the set's layers, those without marks in `codec`.
double kvd_marks_bits(const struct kvd_rotset *set, struct kvd_codecs codec);

// Of a set of transforms, by the layer's index: the codec that its K's terms are for, tc2 or
// tc2.5; and whether they are rotations instead.
uint32_t kvd_layer_codec(const struct kvd_rotset *set, uint64_t index);
bool kvd_layer_rotated(const struct kvd_rotset *set, uint64_t index);

#endif

// Layout between the wire and the inside.
#ifndef KVD_DAEMON_LAYOUT_H
#define KVD_DAEMON_LAYOUT_H

#include "calib/rotset.h"
#include "kvd.pb-c.h"

// Checks and converts; fills in defaults. KVD_E_INVALID says what to mend.
int kvd_layout_from_proto(const Kvd__V1__Layout *from, struct kvd_layout *to,
                          struct kvd_error *err);

// Parts a layout into planes by the marks of its set (calib/marks.h): the marked layers of a plane
// whose codec is the layout's, not one that was named for the plane, go into planes of their own
// behind the others, one for each codec, in the order of their first layers; what a mark has no
// more bits than stays. `asked` is what the layout was made of. KVD_E_PRECONDITION, KVD_E_INVALID:
// what that gives is no layout.
int kvd_layout_mark(struct kvd_layout *l, const Kvd__V1__Layout *asked,
                    const struct kvd_rotset *set, struct kvd_error *err);

// Room for a message that refers to a layout.
struct kvd_proto_layout {
    Kvd__V1__Layout g;
    Kvd__V1__Plane planes[KVD_MAX_PLANES], *refs[KVD_MAX_PLANES];
    Kvd__V1__Windows windows[KVD_MAX_PLANES];
    uint32_t layers[KVD_MAX_LAYERS], plane_layers[KVD_MAX_LAYERS];
    char codecs[KVD_MAX_PLANES][KVD_CODECS_TEXT];
};
Kvd__V1__Layout *kvd_layout_to_proto(const struct kvd_layout *from, struct kvd_proto_layout *to);

// "sha256:<hex>" that names a layout, of these bytes: numbers of 32 bits, little-endian; texts with
// their length before them. "kvd layout 2"; layers and planes; for each layer its model id and its
// plane; for each plane q_heads, kv_heads, head_dim of K and V, the name of the codec (of K
// and V: kvd_codecs_name), sink, recent, window; the rotation set; tp_rank and tp_size.
void kvd_layout_digest(const struct kvd_layout *l, char out[KVD_DIGEST_TEXT]);
// The 32 bytes that it says.
void kvd_layout_digest_bytes(const struct kvd_layout *l, uint8_t out[32]);

// The layout of pages that are kept exact beside those of another: all is bf16. KVD_E_INVALID: it
// has a sink or a window, and so cannot have pages.
int kvd_layout_exact(const struct kvd_layout *of, struct kvd_layout *out, struct kvd_error *err);

#endif

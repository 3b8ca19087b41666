// Layout between the wire and the inside.
#ifndef KVD_DAEMON_LAYOUT_H
#define KVD_DAEMON_LAYOUT_H

#include "kernels/backend.h"
#include "kvd.pb-c.h"

// Checks and converts; fills in defaults. KVD_E_INVALID says what to mend.
int kvd_layout_from_proto(const Kvd__V1__Geometry *from, struct kvd_layout *to,
                          struct kvd_error *err);

// Room for a message that refers to a layout.
struct kvd_proto_layout {
    Kvd__V1__Geometry g;
    Kvd__V1__Windows windows;
    uint32_t layers[KVD_MAX_LAYERS];
};
Kvd__V1__Geometry *kvd_layout_to_proto(const struct kvd_layout *from, struct kvd_proto_layout *to);

#endif

// Geometry between the wire and the inside.
#ifndef KVD_DAEMON_GEOMETRY_H
#define KVD_DAEMON_GEOMETRY_H

#include "kernels/backend.h"
#include "kvd.pb-c.h"

// Checks and converts; fills in defaults. KVD_E_INVALID says what to mend.
int kvd_geometry_from_proto(const Kvd__V1__Geometry *from, struct kvd_geometry *to,
                            struct kvd_error *err);

// Room for a message that refers to a geometry.
struct kvd_proto_geometry {
    Kvd__V1__Geometry g;
    Kvd__V1__Windows windows;
    uint32_t layers[KVD_MAX_LAYERS];
};
Kvd__V1__Geometry *kvd_geometry_to_proto(const struct kvd_geometry *from,
                                         struct kvd_proto_geometry *to);

#endif

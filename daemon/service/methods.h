// The table of methods.
#ifndef KVD_DAEMON_METHODS_H
#define KVD_DAEMON_METHODS_H

#include "daemon/rpc/rpc.h"

extern const struct kvd_method kvd_methods[];
extern const uint32_t kvd_n_methods;

#endif

// Which daemons listen on this host: systemd's units at /run/kvd/INSTANCE/kvd.sock, a kvd without a
// configuration at /run/kvd/kvd.sock. $KVD_RUNTIME_DIR stands for /run/kvd.
#ifndef KVD_CLIENT_INSTANCES_H
#define KVD_CLIENT_INSTANCES_H

#include "proto/base.h"

enum { KVD_MAX_INSTANCES = 256 };

struct kvd_instances {
    char *name[KVD_MAX_INSTANCES];    // "" for /run/kvd/kvd.sock
    char *address[KVD_MAX_INSTANCES]; // "unix:..."
    unsigned n;
};

const char *kvd_runtime_folder(void);
// *all is to be freed by kvd_instances_free.
void kvd_instances_find(struct kvd_instances *all);
void kvd_instances_free(struct kvd_instances *all);

// The address that $KVD_ADDRESS tells, or of the one daemon that listens, to be freed by free; NULL
// if there are several or none, or memory is short (see *err).
char *kvd_instances_default(struct kvd_error *err);

// Refuses what is neither unix:PATH nor HOST:PORT, before a resolver is asked for it.
int kvd_address_check(const char *address, struct kvd_error *err);

#endif

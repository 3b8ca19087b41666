// Descriptors that outlive this process: held under names by systemd or by kvd-keeper. Loop thread.
#ifndef KVD_DAEMON_KEEP_H
#define KVD_DAEMON_KEEP_H

#include "daemon/core/part.h"

#define KVD_KEEP_MARK "kvd-address-" // begins the names of what is no pool's (comeback.c)

// Whether there is somebody who could hold them: kvd-keeper, or systemd.
bool kvd_keep_possible(void);
// Becomes kvd-keeper, which is beside this program and starts it again with the same arguments.
// Returns only when that fails.
void kvd_keep_exec(char **argv);
// Whether they are held: keep is not `no`.
bool kvd_keep_on(const struct kvd_daemon *d);
// What is held under a name since before this process, or -1. The descriptor becomes the caller's;
// it goes on being held.
int kvd_keep_take(struct kvd_daemon *d, const char *name);
// Has a descriptor held under a name, in the place of what was. The fd stays the caller's.
void kvd_keep_put(struct kvd_daemon *d, const char *name, int fd);
void kvd_keep_drop(struct kvd_daemon *d, const char *name);
// What was held before this process and was not taken is held no longer.
void kvd_keep_drop_rest(struct kvd_daemon *d);
// Tells that kvd serves.
void kvd_keep_ready(struct kvd_daemon *d);

extern const struct kvd_part kvd_part_keep;

#endif

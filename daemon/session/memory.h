// The pool's memory: extents of the backend, made ahead of need, lent to workers for reading. Loop
// thread.
#ifndef KVD_DAEMON_MEMORY_H
#define KVD_DAEMON_MEMORY_H

#include "daemon/core/part.h"
#include "daemon/session/session.h"

struct kvd_pool_mem_ops kvd_memory_ops(struct kvd_daemon *d);
// Sees to it that spare extents are made, on libuv's thread pool.
void kvd_memory_ahead(struct kvd_daemon *d);
// Lends the session the extent of an address, unless it has it. KVD_E_LIMIT: the fd socket is full.
int kvd_memory_lend(struct kvd_daemon *d, struct kvd_session *s, uint64_t addr,
                    struct kvd_error *err);
// Forgets what the session was lent.
void kvd_memory_forget(struct kvd_daemon *d, struct kvd_session *s);
// Lends it what each plane is rotated by, unless it has it. KVD_E_LIMIT: the fd socket is full.
int kvd_memory_lend_rotations(struct kvd_daemon *d, struct kvd_session *s, struct kvd_error *err);
// Page number on the wire of an address; 0 has UINT32_MAX.
uint32_t kvd_memory_page_number(const struct kvd_daemon *d, uint64_t addr);
uint32_t kvd_memory_extents(const struct kvd_daemon *d);

extern const struct kvd_part kvd_part_memory;

#endif

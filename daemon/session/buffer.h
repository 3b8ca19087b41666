// Buffers: memory of a worker that kvd maps. Loop thread.
#ifndef KVD_DAEMON_BUFFER_H
#define KVD_DAEMON_BUFFER_H

#include "daemon/core/part.h"
#include "daemon/session/session.h"

enum { KVD_MAX_BUFFERS = 1024 }; // per session

// Jobs hold references, so that releasing it does not unmap it under a kernel.
struct kvd_buffer {
    struct kvd_daemon *d;
    uint64_t id, key;
    enum kvd_memory kind;
    uint8_t *data;
    uint64_t size;
    uint64_t inode; // of a memfd, which may be registered more than once
    uint32_t refs;
    // Called when it is unmapped, before it is freed; NULL: nobody waits for that.
    void (*gone)(struct kvd_buffer *b);
    void *waits;           // who
    struct kvd_user *user; // whose share it is
    UT_hash_handle hh;
};

struct kvd_buffer *kvd_session_buffer(struct kvd_session *s, uint64_t id);
// Maps a worker's memory. The fd stays the caller's. KVD_E_INVALID (seals, size, holes, not
// memory), KVD_E_UNSUPPORTED, KVD_E_QUOTA, KVD_E_LIMIT.
int kvd_session_add_buffer(struct kvd_daemon *d, struct kvd_session *s, uint64_t key, uint64_t id,
                           const struct kvd_foreign *memory, struct kvd_buffer **out,
                           struct kvd_error *err);
void kvd_session_drop_buffer(struct kvd_session *s, struct kvd_buffer *b);
void kvd_buffer_unref(struct kvd_buffer *b);

extern const struct kvd_part kvd_part_buffers;

#endif

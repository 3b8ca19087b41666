// Buffers: memory of a worker that kvd maps. Loop thread.
#ifndef KVD_DAEMON_BUFFER_H
#define KVD_DAEMON_BUFFER_H

#include "daemon/core/part.h"
#include "daemon/session/reclaim.h"
#include "daemon/session/session.h"

enum { KVD_MAX_BUFFERS = 1024 }; // per session

// Jobs hold references, so that releasing it does not unmap it under a kernel.
struct kvd_buffer {
    struct kvd_reclaim reclaim; // at its end
    struct kvd_daemon *d;
    uint64_t id, key;
    enum kvd_memory kind;
    uint8_t *data;
    uint64_t size;
    uint64_t mapped;   // bytes of it that are: all, but of segments that are still to come
    uint64_t segments; // how many it has
    uint64_t inode;    // of a memfd, which may be registered more than once
    uint32_t refs;
    // Called when it is unmapped, before it is freed; NULL: nobody waits for that.
    void (*gone)(struct kvd_buffer *b);
    void *waits;           // who
    struct kvd_user *user; // whose share it is
    UT_hash_handle hh;
};

// One that can be used: NULL as long as segments of it are to come.
struct kvd_buffer *kvd_session_buffer(struct kvd_session *s, uint64_t id);
// The same; *err says why there is none: KVD_E_NOT_FOUND, KVD_E_PRECONDITION.
struct kvd_buffer *kvd_session_want_buffer(struct kvd_session *s, uint64_t id,
                                           struct kvd_error *err);
// The same whatever is to come: to be released.
struct kvd_buffer *kvd_session_any_buffer(struct kvd_session *s, uint64_t id);
// Maps a worker's memory. The fd stays the caller's. KVD_E_INVALID (seals, huge pages, size,
// holes, not memory), KVD_E_UNSUPPORTED, KVD_E_QUOTA, KVD_E_LIMIT.
int kvd_session_add_buffer(struct kvd_daemon *d, struct kvd_session *s, uint64_t key, uint64_t id,
                           const struct kvd_foreign *memory, struct kvd_buffer **out,
                           struct kvd_error *err);
// What a call says of a buffer of KVD_MEMORY_CUDA_SEGMENTS.
struct kvd_segments {
    uint64_t size;   // of the whole buffer
    uint64_t mapped; // by the calls before
    const struct kvd_segment *segments;
    uint32_t n; // at least 1
};
// The same for a part of the segments: makes the buffer of that key and size, or goes on with it; a
// part that is there already is passed over. On failure all is as it was.
int kvd_session_add_segments(struct kvd_daemon *d, struct kvd_session *s, uint64_t key, uint64_t id,
                             const struct kvd_segments *m, struct kvd_buffer **out,
                             struct kvd_error *err);
void kvd_session_drop_buffer(struct kvd_session *s, struct kvd_buffer *b);
void kvd_buffer_unref(struct kvd_buffer *b);

extern const struct kvd_part kvd_part_buffers;

#endif

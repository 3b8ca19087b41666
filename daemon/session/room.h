// Room in the pool for what takes more than some evictions: an extent is emptied for it, a piece in
// each round of the loop, or blocks that kvd itself has are given back, and whoever wants it waits
// meanwhile. Loop thread.
#ifndef KVD_DAEMON_ROOM_H
#define KVD_DAEMON_ROOM_H

#include "daemon/core/part.h"
#include "pool/pool.h"

// Inside of what waits.
struct kvd_room {
    void (*again)(struct kvd_daemon *d, struct kvd_room *room); // asks once more
    bool waits;
    struct kvd_pool_room at;      // the pool's; zeros begin
    struct kvd_room *prev, *next; // the module's own
};

// As kvd_pool_room_make. False: it waits, and `again` will be called.
bool kvd_room_make(struct kvd_daemon *d, struct kvd_room *room, uint32_t ns, uint32_t layout,
                   const struct kvd_pool_need *need);
// It waits no longer, if it does.
void kvd_room_forget(struct kvd_daemon *d, struct kvd_room *room);
// Whether anybody waits for nothing but blocks that kvd itself has: it takes up no others then.
bool kvd_room_wanted_back(const struct kvd_daemon *d);

extern const struct kvd_part kvd_part_room;

#endif

// What asks the store, which may be slow or hang: on libuv's thread pool, a few at a time, so that
// its other threads are there for what is near. Loop thread.
#ifndef KVD_DAEMON_DOWNLOADS_H
#define KVD_DAEMON_DOWNLOADS_H

#include <uv.h>

#include "daemon/core/part.h"

struct kvd_user;

// One of them, inside of what is its owner's.
struct kvd_download {
    void (*run)(struct kvd_download *w);              // on a thread of the pool
    void (*done)(struct kvd_download *w, int status); // on the loop; frees it. status: libuv's
    const struct kvd_user *user; // who asks, and leaves room to others; NULL: nobody alone
    // The module's own.
    struct kvd_daemon *d;
    uv_work_t work;
    bool running;
    struct kvd_download *prev, *next;
};

// Has it run once there is room.
void kvd_download_begin(struct kvd_daemon *d, struct kvd_download *w);
// Takes out one that nobody wants any more. False: it runs already, and `done` follows.
bool kvd_download_drop(struct kvd_download *w);

#endif

// Reading the configuration again. Loop thread.
#ifndef KVD_DAEMON_RELOAD_H
#define KVD_DAEMON_RELOAD_H

#include "daemon/core/part.h"

// What a reload did, line by line.
struct kvd_reload {
    struct kvd_lines errors;  // if there are any, nothing has changed
    struct kvd_lines changed; // and is in force
    struct kvd_lines restart; // differs, but is read at start only
    struct kvd_lines kept;    // was set at run time, and the files say what they said before
};
typedef void kvd_reload_fn(struct kvd_daemon *d, const struct kvd_reload *report, void *ctx);
// Reads the configuration again, on libuv's thread pool, and puts it in force. Then logs what came
// of it and calls `done` (NULL: nobody wants to know) with the same lines. KVD_E_UNAVAILABLE while
// another is under way; without `done`, one more follows it.
int kvd_daemon_reload(struct kvd_daemon *d, kvd_reload_fn *done, void *ctx, struct kvd_error *err);

extern const struct kvd_part kvd_part_reload;

#endif

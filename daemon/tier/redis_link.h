// A connection of hiredis on a loop of libuv, on which values are sent from where they lie. hiredis
// copies all that it sends to the end of one string, and moves what is left of that to its
// beginning at each write: of a megabyte that a socket takes by the hundred kilobytes, all of it,
// several times over. So commands wait here while a value is on its way, and are given to hiredis
// when it is out. The thread that runs the loop.
#ifndef KVD_DAEMON_TIER_REDIS_LINK_H
#define KVD_DAEMON_TIER_REDIS_LINK_H

#include <hiredis/async.h>
#include <uv.h>

#include "proto/base.h"

// Takes over the events of one that was just made. It goes with it. -1: out of memory.
int kvd_redis_link_attach(redisAsyncContext *c, uv_loop_t *loop);

// What follows sends a command behind those before it. `fn` is called once, with no reply if the
// connection is lost before. -1: out of memory, and it is not called.

// As redisAsyncCommand.
int kvd_redis_link_say(redisAsyncContext *c, redisCallbackFn *fn, void *ctx, const char *fmt, ...);
// SET, with expiry after `ttl_s` seconds if that is not 0. The value stays until `fn` is called; if
// that is while kvd_redis_link_sends says so, the connection is of no more use.
int kvd_redis_link_set(redisAsyncContext *c, redisCallbackFn *fn, void *ctx, const char *key,
                       const uint8_t *value, size_t n, uint64_t ttl_s);
// Whether the value of the SET with that `ctx` is not out yet, not all of it.
bool kvd_redis_link_sends(const redisAsyncContext *c, const void *ctx);
// Nothing more is read from values. What follows is to be redisAsyncFree.
void kvd_redis_link_cut(redisAsyncContext *c);

#endif

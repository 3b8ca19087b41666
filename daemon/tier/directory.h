// The tier in a directory: a file for each block, PATH/ab/cdef..., named by its key.
//
// One file a block, not segments of many: a block of 64 tokens is from tens of KiB to a few MiB, so
// a file's own cost is small beside it; what is dropped gives its room back at once, without
// compaction; and a crash can tear one block only. Files are written under another name and then
// renamed. They are not flushed (fsync): what a crash of the host loses is a miss, and what it
// tears does not verify. O_DIRECT where the file system has it: blocks are read once, into the
// pool, and a copy in the page cache would only drive out others.
//
// Several kvds may share a directory: what is there is asked of the file system, and each looks
// over all of it every five minutes, for what others have put and for the limit.
#ifndef KVD_DAEMON_TIER_DIRECTORY_H
#define KVD_DAEMON_TIER_DIRECTORY_H

#include "daemon/tier/backend.h"

extern const struct kvd_tier_ops kvd_tier_directory_ops;
// `limit`: bytes of files at most. Touches no disk yet. NULL with *err set.
void *kvd_tier_directory_new(const char *path, uint64_t limit, uint64_t ttl_s,
                             struct kvd_error *err);

#endif

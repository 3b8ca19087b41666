// kvctl-calib: the part of kvctl that wants OpenBLAS. kvctl runs it for "calib fit" and "calib
// eval", with its own command line.
#ifndef KVD_CLIENT_KVCTL_CALIB_TOOL_H
#define KVD_CLIENT_KVCTL_CALIB_TOOL_H

#include "client/kvctl/kvctl.h"

// Prints and returns the exit code.
int tool_fail(const struct kvd_error *err);
// The same, for the value of an option.
int tool_usage(const char *option, const char *value, const char *want);
// The value of an option that is a number.
uint32_t tool_number(const struct kvctl *k, const char *option, uint32_t otherwise);
// Whether a file can be written at `path` later, as kvd_write_file does it: asked before long work.
int tool_check_out(const char *path, struct kvd_error *err);
// For the options of fit (bytes) and eval (things done).
void tool_progress(void *ctx, uint64_t done, uint64_t total);
void tool_progress_count(void *ctx, uint64_t done, uint64_t total);

#endif

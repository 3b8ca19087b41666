// kvctl-calib: the part of kvctl that wants OpenBLAS. kvctl runs it for "calib fit" and "calib
// eval".
#ifndef KVD_CLIENT_KVCTL_CALIB_TOOL_H
#define KVD_CLIENT_KVCTL_CALIB_TOOL_H

#include "client/kvctl/kvctl.h"

int fit_main(int argc, char **argv);
int eval_main(int argc, char **argv);

// Prints and returns the exit code.
int tool_fail(const struct kvd_error *err);
// For the options of fit (bytes) and eval (things done).
void tool_progress(void *ctx, uint64_t done, uint64_t total);
void tool_progress_count(void *ctx, uint64_t done, uint64_t total);

#endif

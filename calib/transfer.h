// One bounded download into a file, with its digest.
#ifndef KVD_CALIB_TRANSFER_H
#define KVD_CALIB_TRANSFER_H

#include "calib/rotset.h"
#include "calib/store.h"

struct kvd_transfer {
    const char *url; // file, http or https; or a plain absolute path
    int fd;          // an empty file, written from offset 0
    uint64_t max_bytes;
    uint32_t timeout_ms, retries;
    const _Atomic bool *given_up; // NULL: never
    kvd_store_progress *progress;
    void *progress_ctx;
    char digest[KVD_DIGEST_TEXT]; // set on success
    uint64_t bytes;               // set on success
};

// KVD_E_NOT_FOUND (404, no such file), KVD_E_UNAVAILABLE (network, timeout, 5xx), KVD_E_LIMIT (too
// large), KVD_E_INVALID (scheme), KVD_E_CORRUPT (other statuses), or a negative errno (cannot
// write).
int kvd_transfer_run(struct kvd_transfer *t, struct kvd_error *err);

#endif

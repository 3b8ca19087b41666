// Counters of page calls, by namespace. Loop thread.
#ifndef KVD_DAEMON_PAGE_COUNTS_H
#define KVD_DAEMON_PAGE_COUNTS_H

#include "daemon/core/part.h"

// Of a namespace, by its slot, which may be another's by now.
struct kvd_page_count {
    char name[KVD_MAX_NAMESPACE + 1];
    uint64_t looked_up, found, restored, put, known, got,
        encoded;                             // pages; known: of those that came to be put
    uint64_t put_registered, got_registered; // of those put and got, pages in engines' own memory
    uint64_t put_bytes, got_bytes;           // in the engine's bf16
    uint64_t freed; // bytes of exact pages that encoded ones took the place of
};

// A namespace's counters.
struct kvd_page_count *kvd_page_count_of(struct kvd_daemon *d, uint32_t ns);

extern const struct kvd_part kvd_part_pages;

#endif

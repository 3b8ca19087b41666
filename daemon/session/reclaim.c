// Letting go of workers' memory. Whoever drops the last reference frees the pages, which takes a
// second for some gigabytes; that is not for the loop to do.
#include "daemon/session/reclaim.h"

#include <sys/mman.h>

#include "daemon/core/daemon.h"
#include "daemon/core/lifecycle.h"

enum { LITTLE = 1 << 20 }; // bytes that are freed at once

struct reclaim {
    uv_work_t work;
    struct kvd_daemon *d;
    void *data;
    uint64_t size;
};

static void reclaim_work(uv_work_t *work)
{
    const struct reclaim *r = work->data;
    munmap(r->data, r->size);
}

static void reclaim_done(uv_work_t *work, int status)
{
    struct reclaim *r = work->data;
    (void)status;
    kvd_daemon_work_end(r->d);
    free(r);
}

void kvd_reclaim_mapping(struct kvd_daemon *d, void *data, uint64_t size)
{
    struct reclaim *r = size > LITTLE && d->state != KVD_STOPPING ? calloc(1, sizeof(*r)) : NULL;
    if (!r) {
        munmap(data, size);
        return;
    }
    *r = (struct reclaim){.d = d, .data = data, .size = size};
    r->work.data = r;
    kvd_daemon_work_begin(d);
    uv_queue_work(&d->loop, &r->work, reclaim_work, reclaim_done);
}

static void owned_work(uv_work_t *work)
{
    struct kvd_reclaim *r = work->data;
    r->let_go(r);
}

static void owned_done(uv_work_t *work, int status)
{
    struct kvd_reclaim *r = work->data;
    struct kvd_daemon *d = r->d;
    (void)status;
    r->done(r);
    kvd_daemon_work_end(d);
}

void kvd_reclaim_begin(struct kvd_daemon *d, struct kvd_reclaim *r)
{
    if (d->state == KVD_STOPPING) {
        r->let_go(r);
        r->done(r);
        return;
    }
    r->d = d;
    r->work.data = r;
    kvd_daemon_work_begin(d);
    uv_queue_work(&d->loop, &r->work, owned_work, owned_done);
}

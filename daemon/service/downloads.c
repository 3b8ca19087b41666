#include "daemon/service/downloads.h"

#include <utlist.h>

#include "daemon/core/lifecycle.h"

enum { AT_ONCE = 3 };

static void start(struct kvd_daemon *d);

static void on_run(uv_work_t *work)
{
    struct kvd_download *w = work->data;
    w->run(w);
}

static void on_done(uv_work_t *work, int status)
{
    struct kvd_download *w = work->data;
    struct kvd_daemon *d = w->d;
    DL_DELETE(d->downloads, w);
    w->done(w, status);
    start(d);
    kvd_daemon_work_end(d);
}

// Starts those for which there is room. One user leaves the last place to others.
static void start(struct kvd_daemon *d)
{
    struct kvd_download *w;
    const struct kvd_user *users[AT_ONCE];
    uint32_t running = 0;
    DL_FOREACH(d->downloads, w)
    if (w->running)
        users[running++] = w->user;
    DL_FOREACH(d->downloads, w)
    {
        uint32_t own = 0;
        if (running == AT_ONCE)
            return;
        for (uint32_t i = 0; i < running; i++)
            own += users[i] == w->user;
        if (w->running || own == AT_ONCE - 1)
            continue;
        w->running = true;
        users[running++] = w->user;
        kvd_daemon_work_begin(d);
        uv_queue_work(&d->loop, &w->work, on_run, on_done);
    }
}

void kvd_download_begin(struct kvd_daemon *d, struct kvd_download *w)
{
    w->d = d;
    w->work.data = w;
    w->running = false;
    DL_APPEND(d->downloads, w);
    start(d);
}

bool kvd_download_drop(struct kvd_download *w)
{
    if (w->running)
        return false;
    DL_DELETE(w->d->downloads, w);
    return true;
}

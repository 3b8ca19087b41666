// systemd: READY, STOPPING and the watchdog. Without systemd, nothing happens here.
#include "daemon/core/daemon.h"
#include "daemon/core/notify.h"

#ifdef KVD_SYSTEMD
#include <systemd/sd-daemon.h>

static void on_watchdog(uv_timer_t *timer)
{
    (void)timer;
    sd_notify(0, "WATCHDOG=1");
}

void kvd_notify_ready(struct kvd_daemon *d)
{
    uint64_t usec;
    sd_notifyf(0, "READY=1\nSTATUS=Serving with the %s backend", d->backend->ops->name);
    if (sd_watchdog_enabled(0, &usec) > 0)
        uv_timer_start(&d->watchdog, on_watchdog, usec / 2000, usec / 2000);
}

void kvd_notify_stopping(void)
{
    sd_notify(0, "STOPPING=1");
}
#else
void kvd_notify_ready(struct kvd_daemon *d)
{
    (void)d;
}

void kvd_notify_stopping(void) {}
#endif

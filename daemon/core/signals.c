#include "daemon/core/signals.h"

#include <signal.h>

#include "daemon/core/keep.h"
#include "daemon/core/lifecycle.h"
#include "daemon/core/reload.h"

static void on_stop_signal(uv_signal_t *signal, int number)
{
    struct kvd_daemon *d = signal->data;
    kvd_notice("stopping signal=%s", number == SIGTERM ? "SIGTERM" : "SIGINT");
    // Sessions that the next kvd goes on with need not end first.
    bool go_on = kvd_keep_on(d) && d->config.resume_ms;
    kvd_daemon_drain(d, go_on ? 0 : d->config.drain_timeout_ms);
}

static void on_hup(uv_signal_t *signal, int number)
{
    (void)number;
    kvd_daemon_reload(signal->data, NULL, NULL, NULL);
}

static void start_signal(struct kvd_daemon *d, uv_signal_t *s, uv_signal_cb cb, int number)
{
    uv_signal_init(&d->loop, s);
    s->data = d;
    uv_signal_start(s, cb, number);
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    start_signal(d, &d->sig_term, on_stop_signal, SIGTERM);
    start_signal(d, &d->sig_int, on_stop_signal, SIGINT);
    start_signal(d, &d->sig_hup, on_hup, SIGHUP);
    return KVD_OK;
}

// Who asks it to stop while it is ending gets what was asked for: it ends as it would have.
static void deinit(struct kvd_daemon *d)
{
    (void)d;
    signal(SIGTERM, SIG_IGN);
    signal(SIGINT, SIG_IGN);
}

const struct kvd_part kvd_part_signals = {.init = init, .deinit = deinit};

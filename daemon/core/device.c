#include "daemon/core/device.h"

#include "daemon/core/lifecycle.h"

enum { CHECK_MS = 200 };

// The backend that is asked for; "auto": the GPU where it is usable, else the CPU.
static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct kvd_config *c = &d->config;
    if (strcmp(c->backend, "cpu") != 0) {
#ifdef KVD_CUDA
        if (kvd_cuda_present(err) == KVD_OK)
            d->backend = kvd_cuda_backend_new(c->device, err);
        if (d->backend)
            return KVD_OK;
#else
        kvd_fail(err, KVD_E_UNSUPPORTED, "this kvd was built without CUDA");
#endif
        if (strcmp(c->backend, "cuda") == 0)
            return kvd_fail_in(err, "backend cuda (backend cpu needs no GPU)");
        kvd_info("no GPU: %s; running on the CPU", err->text);
        d->no_gpu = *err;
        *err = (struct kvd_error){0};
    } else {
        kvd_fail(&d->no_gpu, KVD_E_UNSUPPORTED, "its configuration says backend = cpu");
    }
    d->backend = kvd_cpu_backend_new(c->threads, c->isa[0] ? c->isa : NULL, err);
    return d->backend ? KVD_OK : err->code;
}

// A fault of another client of MPS is nothing that a call of kvd's fails by while it has none; and
// nobody gets a new context under MPS until all have ended whose context is gone.
static void on_device_timer(uv_timer_t *timer)
{
    kvd_daemon_check_device(timer->data);
}

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    (void)err;
    if (d->backend->ops->lost)
        uv_timer_start(&d->device_timer, on_device_timer, CHECK_MS, CHECK_MS);
    return KVD_OK;
}

static void deinit(struct kvd_daemon *d)
{
    kvd_backend_free(&d->backend);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    char device[2 * KVD_CONFIG_TEXT];
    kvd_metric_escape(d->backend->ops->device(d->backend), device, sizeof(device));
    kvd_metric_head(f, "kvd_build_info", "gauge", "Always 1; the labels tell version and backend.");
    fprintf(f, "kvd_build_info{version=\"%s\",backend=\"%s\"} 1\n", kvd_build_version(),
            d->backend->ops->name);
    kvd_metric_head(f, "kvd_device_info", "gauge",
                    "Always 1; the labels tell what the backend runs on, and the instance of this "
                    "start.");
    fprintf(f, "kvd_device_info{backend=\"%s\",index=\"%u\",device=\"%s\",start=\"%s\"} 1\n",
            d->backend->ops->name, d->config.device, device, d->instance);
}

const struct kvd_part kvd_part_device = {
    .init = init, .start = start, .deinit = deinit, .metrics = metrics};

// grpc.health.v1.Health.
#include "daemon/service/health.h"

#include <utlist.h>

#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "health.pb-c.h"

static bool known(const char *service)
{
    return !*service || strcmp(service, "kvd.v1.KvCache") == 0 ||
           strcmp(service, "kvd.v1.Admin") == 0;
}

static Grpc__Health__V1__HealthCheckResponse__ServingStatus status_of(const struct kvd_daemon *d)
{
    return d->state == KVD_READY
               ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
               : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
}

void kvd_on_health_check(struct kvd_call *call, const void *request)
{
    const Grpc__Health__V1__HealthCheckRequest *req = request;
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    r.status = status_of(call->d);
    if (known(req->service))
        kvd_call_reply(call, &r);
    else
        kvd_call_fail(call, KVD_E_NOT_FOUND, "there is no service %.100s here", req->service);
}

static void unlink_watcher(struct kvd_call *c)
{
    LL_DELETE2(c->d->health_watchers, c, next_watch);
}

void kvd_on_health_watch(struct kvd_call *call, const void *request)
{
    const Grpc__Health__V1__HealthCheckRequest *req = request;
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    r.status = known(req->service)
                   ? status_of(call->d)
                   : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
    kvd_call_send(call, &r);
    if (!known(req->service))
        return; // the stream stays open, as the protocol says
    call->on_closed = unlink_watcher;
    LL_PREPEND2(call->d->health_watchers, call, next_watch);
}

static void draining(struct kvd_daemon *d)
{
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    r.status = status_of(d);
    for (struct kvd_call *c = d->health_watchers; c; c = c->next_watch)
        kvd_call_send(c, &r);
}

const struct kvd_part kvd_part_health = {.draining = draining};

// A session without an fd socket ends when nothing is heard of its worker for a while: a thread
// says that the worker is alive, three times in that while.
#include "client/lib/client.h"

enum { CALL_MS = 2000 };

struct kvd_lease {
    kvd_client *client;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool stop;
    pthread_t thread;
};

static uint32_t keep_alive(kvd_client *c)
{
    Kvd__V1__KeepAliveRequest req = KVD__V1__KEEP_ALIVE_REQUEST__INIT;
    Kvd__V1__KeepAliveReply *reply;
    uint32_t ms = KVD_MIN(c->timeout_ms, (uint32_t)CALL_MS), lease = 0;
    if (kvd_client_enter(c, kvd_now_ms() + ms, NULL))
        return 0;
    req.session = c->session;
    // A session that is gone is the next call's to find.
    if (!c->lost &&
        kvd_channel_call(c->channel, "/kvd.v1.KvCache/KeepAlive", &req,
                         &kvd__v1__keep_alive_reply__descriptor, ms, &reply, NULL) == KVD_OK) {
        lease = reply->lease_ms;
        kvd__v1__keep_alive_reply__free_unpacked(reply, NULL);
    }
    kvd_gate_leave(&c->gate);
    return lease;
}

static void *run(void *ctx)
{
    struct kvd_lease *l = ctx;
    uint32_t lease = keep_alive(l->client);
    pthread_mutex_lock(&l->lock);
    while (!l->stop) {
        uint64_t next = kvd_now_ms() + KVD_MAX(lease, 900u) / 3;
        while (!l->stop && kvd_left_ms(next))
            kvd_cond_wait(&l->wake, &l->lock, next);
        if (l->stop)
            break;
        pthread_mutex_unlock(&l->lock);
        uint32_t told = keep_alive(l->client);
        lease = told ? told : lease;
        pthread_mutex_lock(&l->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

int kvd_lease_start(kvd_client *c, struct kvd_error *err)
{
    struct kvd_lease *l = calloc(1, sizeof(*l));
    if (!l)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    l->client = c;
    pthread_mutex_init(&l->lock, NULL);
    kvd_cond_init(&l->wake);
    c->lease = l;
    if (pthread_create(&l->thread, NULL, run, l) == 0)
        return KVD_OK;
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->wake);
    free(l);
    c->lease = NULL;
    return kvd_fail(err, KVD_E_INTERNAL, "cannot start a thread");
}

void kvd_lease_stop(kvd_client *c)
{
    struct kvd_lease *l = KVD_TAKE(c->lease);
    if (!l)
        return;
    pthread_mutex_lock(&l->lock);
    l->stop = true;
    pthread_cond_signal(&l->wake);
    pthread_mutex_unlock(&l->lock);
    pthread_join(l->thread, NULL);
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->wake);
    free(l);
}

// Every function that talks to the daemon, each with a client and a thread of its own: how long it
// takes when the daemon has stopped, is dead, or is another that accepts and says nothing. The
// test's driver brings that about when it reads "ready", and writes a line when it has. Prints
// "NAME RESULT MS" for each.
// Also: how soon a client works again after the daemon is back.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

enum { TIMEOUT_MS = 1000 };

struct probe {
    const char *name;
    kvd_result (*call)(struct probe *p);
    const char *address;
    pthread_t thread;
    kvd_client *client;
    kvd_buffer *buffer;
    kvd_direct *direct;
    uint64_t id;
    kvd_failure failure;
    kvd_result rc;
    double ms;
};

static double now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

// A clock that stands still while this process has no turn: a thread counts every 5 ms, and what is
// more than 50 ms is not what a call has waited for. A call that waits does not hold the thread up.
static pthread_mutex_t clock_lock = PTHREAD_MUTEX_INITIALIZER;
static double counted_ms, last_ms;

static double turn_ms(void)
{
    pthread_mutex_lock(&clock_lock);
    double now = now_ms(), gap = now - last_ms;
    double counted = counted_ms += gap < 50 ? gap : 50;
    last_ms = now;
    pthread_mutex_unlock(&clock_lock);
    return counted;
}

static void *count(void *ctx)
{
    for (;;) {
        turn_ms();
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
    return ctx;
}

static kvd_item item_for(struct probe *p)
{
    kvd_item item = item_of(16);
    item.sequence = p->id;
    item.k.buffer = item.v.buffer = item.q.buffer = item.o.buffer = p->buffer;
    return item;
}

#define PROBE(what, ...)                                                                           \
    static kvd_result what(struct probe *p)                                                        \
    {                                                                                              \
        __VA_ARGS__;                                                                               \
    }

PROBE(open_one, kvd_options o = options_of(p->address); o.timeout_ms = TIMEOUT_MS; kvd_client * c;
      return kvd_open(&o, &c, &p->failure))
PROBE(close_one, kvd_close(&p->client); return 0)
PROBE(buffer_new, kvd_buffer *b; return kvd_buffer_new(p->client, 4096, &b, &p->failure))
PROBE(buffer_free, kvd_buffer_free(&p->buffer); return 0)
PROBE(create, uint64_t made; return kvd_sequences_create(p->client, 1, &made, &p->failure))
PROBE(fork_one, uint64_t made; return kvd_sequence_fork(p->client, p->id, 1, &made, &p->failure))
PROBE(truncate_one, return kvd_sequence_truncate(p->client, p->id, 0, &p->failure))
PROBE(publish, return kvd_sequence_publish(p->client, p->id, "x", true, &p->failure))
PROBE(attach, kvd_sequence_info i = KVD_NEW(kvd_sequence_info);
      return kvd_sequence_attach(p->client, "x", &i, &p->failure))
PROBE(free_one, return kvd_sequences_free(p->client, &p->id, 1, false, &p->failure))
PROBE(describe, kvd_sequence_info i = KVD_NEW(kvd_sequence_info);
      return kvd_sequence_describe(p->client, p->id, &i, &p->failure))
PROBE(append, kvd_item i = item_for(p); return kvd_append(p->client, ALL, &i, 1, &p->failure))
PROBE(attend, kvd_item i = item_for(p); return kvd_attend(p->client, ALL, NULL, &i, 1, &p->failure))
PROBE(step, kvd_item i = item_for(p); return kvd_step(p->client, ALL, NULL, &i, 1, &p->failure))
PROBE(enqueue, kvd_item i = item_for(p);
      return kvd_enqueue(p->client, NULL, KVD_CALL_STEP, ALL, NULL, &i, 1, &p->failure))
PROBE(rotate, kvd_tensor_ref x = {.buffer = p->buffer};
      return kvd_rotate(p->client, KVD_KEYS, false, ALL, 1, KV, &x, &x, &p->failure))
PROBE(read_some, kvd_tensor_ref x = {.buffer = p->buffer};
      return kvd_read_tokens(p->client, ALL, p->id, 0, 1, &x, NULL, &p->failure))
PROBE(event, kvd_event e = KVD_NEW(kvd_event);
      return kvd_next_event(p->client, TIMEOUT_MS, &e, &p->failure))
PROBE(direct_open, kvd_direct *d;
      kvd_direct_options o = KVD_NEW(kvd_direct_options, .slots = 1, .max_tokens = 1000);
      return kvd_direct_open(p->client, &o, &d, &p->failure))
PROBE(direct_bind, return kvd_direct_bind(p->direct, 1, p->id, &p->failure))
PROBE(direct_flush, return kvd_direct_flush(p->direct, &p->failure))
PROBE(direct_close, kvd_direct_close(&p->direct); return 0)

static kvd_result step_direct(struct probe *p)
{
    kvd_result rc = kvd_direct_begin(p->direct, NULL, &p->failure);
    return rc ? rc : kvd_direct_end(p->direct, NULL, NULL, &p->failure);
}

static kvd_result direct_begin(struct probe *p) // the one that has to wait
{
    kvd_result rc = 0;
    double began = turn_ms();
    for (int i = 0; i < 200 && rc == 0; i++) {
        began = turn_ms();
        rc = step_direct(p);
    }
    p->ms = turn_ms() - began;
    return rc;
}

static struct probe probes[] = {
    {.name = "kvd_open", .call = open_one},
    {.name = "kvd_close", .call = close_one},
    {.name = "kvd_buffer_new", .call = buffer_new},
    {.name = "kvd_buffer_free", .call = buffer_free},
    {.name = "kvd_sequences_create", .call = create},
    {.name = "kvd_sequence_fork", .call = fork_one},
    {.name = "kvd_sequence_truncate", .call = truncate_one},
    {.name = "kvd_sequence_publish", .call = publish},
    {.name = "kvd_sequence_attach", .call = attach},
    {.name = "kvd_sequences_free", .call = free_one},
    {.name = "kvd_sequence_describe", .call = describe},
    {.name = "kvd_append", .call = append},
    {.name = "kvd_attend", .call = attend},
    {.name = "kvd_step", .call = step},
    {.name = "kvd_enqueue", .call = enqueue},
    {.name = "kvd_rotate", .call = rotate},
    {.name = "kvd_read_tokens", .call = read_some},
    {.name = "kvd_next_event", .call = event},
    {.name = "kvd_direct_open", .call = direct_open},
    {.name = "kvd_direct_bind", .call = direct_bind},
    {.name = "kvd_direct_begin", .call = direct_begin},
    {.name = "kvd_direct_flush", .call = direct_flush},
    {.name = "kvd_direct_close", .call = direct_close},
};
enum { PROBES = sizeof(probes) / sizeof(*probes) };

static void prepare(struct probe *p)
{
    kvd_options o = options_of(p->address);
    kvd_direct_options d = KVD_NEW(kvd_direct_options, .slots = 2, .max_tokens = 1000);
    o.timeout_ms = TIMEOUT_MS;
    NEED(kvd_open(&o, &p->client, ERR) == 0);
    NEED(kvd_buffer_new(p->client, BYTES, &p->buffer, ERR) == 0);
    NEED(kvd_sequences_create(p->client, 1, &p->id, ERR) == 0);
    kvd_item item = item_for(p);
    NEED(kvd_append(p->client, ALL, &item, 1, ERR) == 0);
    bool is_direct = strstr(p->name, "direct") && p->call != direct_open;
    if (!is_direct)
        return;
    NEED(kvd_direct_open(p->client, &d, &p->direct, ERR) == 0);
    NEED(kvd_direct_bind(p->direct, 0, p->id, ERR) == 0);
    for (int i = 0; i < 8; i++) // something in the tail
        NEED(step_direct(p) == 0);
}

static void *run(void *ctx)
{
    struct probe *p = ctx;
    double began = turn_ms();
    p->rc = p->call(p);
    if (p->ms == 0)
        p->ms = turn_ms() - began;
    return NULL;
}

int deadlines(const char *address)
{
    char line[16];
    pthread_t counts;
    for (int i = 0; i < PROBES; i++) {
        probes[i].address = address;
        prepare(&probes[i]);
    }
    printf("ready\n");
    fflush(stdout);
    if (!fgets(line, sizeof(line), stdin))
        return 1;
    last_ms = now_ms();
    NEED(pthread_create(&counts, NULL, count, NULL) == 0);
    for (int i = 0; i < PROBES; i++)
        NEED(pthread_create(&probes[i].thread, NULL, run, &probes[i]) == 0);
    for (int i = 0; i < PROBES; i++)
        pthread_join(probes[i].thread, NULL);
    for (int i = 0; i < PROBES; i++)
        printf("%s %d %.0f\n", probes[i].name, (int)probes[i].rc, probes[i].ms);
    fflush(stdout);
    _exit(0); // closing would wait for the daemon once more
}

// Calls every few milliseconds until one succeeds again after the daemon was gone; the driver kills
// it when it reads "ready" and starts it anew.
int reconnects(const char *address)
{
    kvd_info info = KVD_NEW(kvd_info);
    uint64_t made;
    bool failed = false;
    open_client(address);
    printf("ready\n");
    fflush(stdout);
    for (double end = now_ms() + 20000; now_ms() < end;) {
        kvd_result rc = kvd_sequences_create(client, 1, &made, ERR);
        failed |= rc != 0;
        if (failed && rc == 0) {
            struct timespec t;
            clock_gettime(CLOCK_REALTIME, &t);
            printf("%.3f\n", (double)t.tv_sec + (double)t.tv_nsec * 1e-9);
            NEED(kvd_get_info(client, &info, ERR) == 0);
            kvd_close(&client);
            return 0;
        }
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
    return 1;
}

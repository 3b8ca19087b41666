// Queues of page calls.
// usage: client queue ADDRESS           order, cancelling, a full queue, waiting, the eventfd,
// freeing
//        client queue_killed ADDRESS    "ready" when tickets are under way, then what a kvd that
//                                       was killed makes of them; "again", and what the next finds
//        client queue_gpu ADDRESS       blocks of an emulated GPU, in the order of the engine's
//        stream
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "client.h"
#ifdef KVD_EMULATED
#include "cuda_runtime_api.h"
#endif

enum { BLOCKS = 48, TOKENS = 64, Q_LAYERS = 2, Q_HEADS = 16, Q_DIM = 64, KEY = 32, QUEUED = 16 };
enum { BLOCK = TOKENS * Q_HEADS * Q_DIM, SIDE = BLOCKS * BLOCK };

// An engine's KV: [K and V][layers][blocks][tokens][heads][dim].
struct engine {
    uint16_t *side[2][Q_LAYERS];
    uint32_t blocks[BLOCKS];
};

static const kvd_bytes space = {"queues", 6};

static struct engine engine_new(uint16_t seed)
{
    struct engine e;
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++) {
            e.side[v][i] = malloc(SIDE * sizeof(uint16_t));
            NEED(e.side[v][i]);
            for (int j = 0; j < SIDE; j++) // numbers between 1 and 2, and no NaN
                e.side[v][i][j] =
                    (uint16_t)(0x3f80 + (seed + v + i * 7 + j / BLOCK * 13 + j) % 128);
        }
    for (uint32_t i = 0; i < BLOCKS; i++)
        e.blocks[i] = i;
    return e;
}

static void engine_free(struct engine *e)
{
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            free(e->side[v][i]);
}

static kvd_paged paged_of(struct engine *e, uint32_t first)
{
    kvd_strides s = {BLOCK * 2, Q_DIM * 2, Q_HEADS * Q_DIM * 2, 2};
    return KVD_NEW(kvd_paged, .k = (void *const *)e->side[0], .v = (void *const *)e->side[1],
                   .k_bytes = SIDE * 2, .v_bytes = SIDE * 2, .k_strides = s, .v_strides = s,
                   .all_blocks = BLOCKS, .block_tokens = TOKENS, .blocks = e->blocks + first,
                   .n_blocks = BLOCKS - first);
}

// Names of pages `first` on; of one thing, `name`, and the same at each call.
static kvd_page_keys keys_of(char keys[BLOCKS][KEY], char name, uint32_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        snprintf(keys[i], KEY, "%c page number %017u", name, first + i);
    return KVD_NEW(kvd_page_keys, .keys = keys, .key_bytes = KEY, .pages = n);
}

static kvd_client *open_pages(const char *address)
{
    static const uint32_t layers[Q_LAYERS] = {0, 1};
    kvd_options o = options_of(address);
    o.layers = layers;
    o.n_layers = Q_LAYERS;
    o.q_heads = o.kv_heads = Q_HEADS;
    o.head_dim_k = o.head_dim_v = Q_DIM;
    o.pages = o.no_windows = true;
    kvd_client *c;
    NEED(kvd_open(&o, &c, ERR) == 0);
    return c;
}

static kvd_queue *queue_new(kvd_client *c, uint32_t tickets)
{
    kvd_queue *q;
    NEED(kvd_queue_new(c, tickets, &q, ERR) == 0);
    return q;
}

// Queues `n` pages from `first` on. What is named, and where it is, may go as soon as it returns.
static uint64_t queue_put(kvd_queue *q, struct engine *e, char name, uint32_t first, uint32_t n)
{
    char names[BLOCKS][KEY];
    uint32_t blocks[BLOCKS];
    bool exact[BLOCKS];
    kvd_page_keys k = keys_of(names, name, first, n);
    kvd_paged p = paged_of(e, first);
    uint64_t ticket = 0;
    memcpy(blocks, p.blocks, n * sizeof(*blocks));
    p.blocks = blocks;
    p.n_blocks = n;
    memset(exact, true, sizeof(exact));
    NEED(kvd_queue_put(q, &space, &k, exact, &p, NULL, &ticket, ERR) == 0);
    memset(names, 'x', sizeof(names));
    memset(blocks, 0xff, sizeof(blocks));
    memset(exact, false, sizeof(exact));
    return ticket;
}

static uint64_t queue_get(kvd_queue *q, struct engine *e, char name, uint32_t first, uint32_t n,
                          uint8_t *kinds)
{
    char names[BLOCKS][KEY];
    kvd_page_keys k = keys_of(names, name, first, n);
    kvd_paged p = paged_of(e, first);
    uint64_t ticket = 0;
    NEED(kvd_queue_get(q, &space, &k, &p, kinds, &ticket, ERR) == 0);
    memset(names, 'x', sizeof(names));
    return ticket;
}

static bool readable(kvd_queue *q, int ms)
{
    struct pollfd p = {.events = POLLIN};
    NEED(kvd_queue_fd(q, &p.fd, ERR) == 0);
    return poll(&p, 1, ms) == 1;
}

// The next ticket that ends.
static kvd_ended next(kvd_queue *q)
{
    kvd_ended ended = KVD_NEW(kvd_ended);
    uint32_t n = 0;
    NEED(readable(q, 60000));
    NEED(kvd_queue_poll(q, &ended, 1, &n, ERR) == 0 && n == 1);
    failure = ended.failure;
    return ended;
}

static bool equal(const struct engine *a, const struct engine *b, uint32_t first, uint32_t n)
{
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            if (memcmp(a->side[v][i] + (size_t)first * BLOCK, b->side[v][i] + (size_t)first * BLOCK,
                       (size_t)n * BLOCK * 2))
                return false;
    return true;
}

// -- stopping kvd -------------------------------------------------------------------------------
// What is under way does not end meanwhile, however long this process waits for its own turn.

static pid_t stopped;

static void go_on(void)
{
    if (stopped)
        kill(stopped, SIGCONT);
    stopped = 0;
}

static void stop(const char *address)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    struct ucred peer;
    socklen_t bytes = sizeof(peer);
    snprintf(at.sun_path, sizeof(at.sun_path), "%s.fd", address + strlen("unix:"));
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    NEED(fd >= 0 && connect(fd, (struct sockaddr *)&at, sizeof(at)) == 0);
    NEED(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && peer.pid > 0);
    close(fd);
    stopped = peer.pid;
    NEED(kill(stopped, SIGSTOP) == 0);
}

// Another process lets it go on after a second.
static void go_on_soon(void)
{
    if (fork() == 0) {
        sleep(1);
        go_on();
        _exit(0);
    }
    stopped = 0;
}

// -- queues -------------------------------------------------------------------------------------

// What was put first is there for what is got behind it.
static void in_order(kvd_client *c)
{
    struct engine from = engine_new(1), to = engine_new(77);
    uint8_t kinds[BLOCKS] = {0};
    kvd_queue *q = queue_new(c, 0);
    NEED(!readable(q, 0));
    for (uint32_t i = 0; i < 8; i++) {
        NEED(queue_put(q, &from, 'o', 6 * i, 6) == 2 * i + 1);
        NEED(queue_get(q, &to, 'o', 6 * i, 6, kinds + 6 * i) == 2 * i + 2);
    }
    for (uint64_t i = 1; i <= 16; i++) {
        kvd_ended ended = next(q);
        NEED(ended.ticket == i && ended.result == KVD_SUCCESS && ended.us);
    }
    NEED(!readable(q, 0));
    NEED(equal(&from, &to, 0, BLOCKS));
    for (int i = 0; i < BLOCKS; i++)
        NEED(kinds[i] == KVD_STORED_EXACT);
    // One that fails, as what it names is not there, holds up no other.
    queue_get(q, &to, 'n', 0, 1, NULL);
    queue_get(q, &to, 'o', 0, 1, NULL);
    kvd_ended failed = next(q);
    NEED(failed.result == KVD_ERR_NOT_FOUND && strstr(failed.failure.text, "not there"));
    NEED(next(q).result == KVD_SUCCESS);
    kvd_queue_free(&q);
    NEED(!q);
    engine_free(&from);
    engine_free(&to);
}

static void bounds(kvd_client *c)
{
    struct engine from = engine_new(2), to = engine_new(3);
    kvd_ended some[8];
    uint32_t n = 0;
    kvd_queue *q = queue_new(c, 4);
    for (int i = 0; i < 4; i++)
        queue_put(q, &from, 'f', 12 * (uint32_t)i, 12);
    char names[BLOCKS][KEY];
    kvd_page_keys k = keys_of(names, 'f', 0, 1);
    kvd_paged p = paged_of(&to, 0);
    NEED(kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR) == KVD_ERR_EXHAUSTED &&
         strstr(failure.text, "4 tickets"));
    // Those that have ended count until they were told of.
    NEED(kvd_queue_wait(q, 4, 60000, ERR) == 0 && readable(q, 0));
    NEED(kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR) == KVD_ERR_EXHAUSTED);
    for (int i = 0; i < 8; i++)
        some[i] = KVD_NEW(kvd_ended);
    NEED(kvd_queue_poll(q, some, 3, &n, ERR) == 0 && n == 3 && readable(q, 0));
    NEED(kvd_queue_poll(q, some, 8, &n, ERR) == 0 && n == 1 && some[0].ticket == 4);
    NEED(!readable(q, 0) && kvd_queue_poll(q, some, 8, &n, ERR) == 0 && n == 0);
    NEED(kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR) == 0 && next(q).ticket == 5);
    // What is wrong shows at once, and is no ticket.
    k.key_bytes = 8;
    NEED(kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR) == KVD_ERR_INVALID);
    NEED(kvd_queue_wait(q, 6, 0, ERR) == KVD_ERR_INVALID && strstr(failure.text, "1 to 5"));
    NEED(kvd_queue_cancel(q, 0, ERR) == KVD_ERR_INVALID);
    some[0].size = 4;
    NEED(kvd_queue_poll(q, some, 1, &n, ERR) == KVD_ERR_INVALID);
    kvd_queue *other;
    NEED(kvd_queue_new(c, 5000, &other, ERR) == KVD_ERR_INVALID);
    kvd_queue_free(&q);
    engine_free(&from);
    engine_free(&to);
}

// A long put in front, and others that are taken back before they begin, or are freed.
static void taken_back(const char *address)
{
    struct engine from = engine_new(4), to = engine_new(5);
    kvd_client *c = open_pages(address);
    kvd_queue *q = queue_new(c, 0), *loads = queue_new(c, 0);
    stop(address);
    uint64_t first = queue_put(q, &from, 't', 0, BLOCKS), second = queue_put(q, &from, 'u', 0, 8),
             third = queue_put(q, &from, 'w', 0, 8);
    NEED(kvd_queue_cancel(q, second, ERR) == 0);
    NEED(kvd_queue_wait(q, second, 0, ERR) == 0);
    NEED(kvd_queue_cancel(q, second, ERR) == KVD_ERR_PRECONDITION);
    NEED(kvd_queue_wait(q, first, 0, ERR) == KVD_ERR_TIMEOUT);
    go_on();
    NEED(kvd_queue_wait(q, third, 60000, ERR) == 0);
    NEED(kvd_queue_cancel(q, third, ERR) == KVD_ERR_PRECONDITION);
    NEED(next(q).ticket == first && next(q).ticket == third && !readable(q, 0));
    queue_get(loads, &to, 'u', 0, 8, NULL);
    queue_get(loads, &to, 'w', 0, 8, NULL);
    NEED(next(loads).result == KVD_ERR_NOT_FOUND && next(loads).result == KVD_SUCCESS);
    // Freed amid some: what has begun is done, what has not is not, and neither is touched later.
    stop(address);
    queue_put(q, &from, 'y', 0, BLOCKS);
    queue_put(q, &from, 'z', 0, 8);
    go_on_soon();
    kvd_queue_free(&q);
    engine_free(&from);
    queue_get(loads, &to, 'z', 0, 8, NULL);
    NEED(next(loads).result == KVD_ERR_NOT_FOUND);
    queue_get(loads, &to, 't', 0, BLOCKS, NULL);
    kvd_close(&c); // and the queue that is left
    engine_free(&to);
}

// Several threads queue, take back, wait and poll: each ticket ends once, or is taken back.
struct at_once {
    kvd_queue *q;
    struct engine from;
    _Atomic uint32_t number, taken_back, ended;
};

static void *queue_some(void *ctx)
{
    struct at_once *a = ctx;
    const uint32_t me = atomic_fetch_add(&a->number, 1);
    for (uint32_t i = 0; i < 30; i++) {
        uint64_t ticket = 0;
        char names[BLOCKS][KEY];
        kvd_page_keys k = keys_of(names, (char)('A' + me), i, 1);
        kvd_paged p = paged_of(&a->from, i);
        kvd_failure why;
        while (kvd_queue_put(a->q, &space, &k, NULL, &p, NULL, &ticket, &why) == KVD_ERR_EXHAUSTED)
            usleep(100);
        NEED(ticket);
        if (i % 3 == me % 3 && kvd_queue_cancel(a->q, ticket, &why) == KVD_SUCCESS)
            atomic_fetch_add(&a->taken_back, 1);
        NEED(kvd_queue_wait(a->q, ticket, i % 5 ? 0 : 60000, &why) != KVD_ERR_INVALID);
    }
    return NULL;
}

static void *poll_some(void *ctx)
{
    struct at_once *a = ctx;
    for (int i = 0; i < 60000 && atomic_load(&a->ended) + atomic_load(&a->taken_back) < 90; i++) {
        kvd_ended some[4];
        uint32_t n = 0;
        kvd_failure why;
        for (int j = 0; j < 4; j++)
            some[j] = KVD_NEW(kvd_ended);
        readable(a->q, 1);
        NEED(kvd_queue_poll(a->q, some, 4, &n, &why) == 0);
        for (uint32_t j = 0; j < n; j++)
            NEED(some[j].result == KVD_SUCCESS);
        atomic_fetch_add(&a->ended, n);
    }
    return NULL;
}

static void at_once(kvd_client *c)
{
    struct at_once a = {.q = queue_new(c, 8), .from = engine_new(12)};
    pthread_t threads[5];
    for (int i = 0; i < 5; i++)
        NEED(pthread_create(&threads[i], NULL, i < 3 ? queue_some : poll_some, &a) == 0);
    for (int i = 0; i < 5; i++)
        pthread_join(threads[i], NULL);
    NEED(atomic_load(&a.ended) + atomic_load(&a.taken_back) == 90 && !readable(a.q, 0));
    kvd_queue_free(&a.q);
    engine_free(&a.from);
}

// In a child nothing is touched: neither what the parent's thread does, nor the eventfd's count.
static void in_a_child(kvd_client *c)
{
    struct engine from = engine_new(6);
    kvd_queue *q = queue_new(c, 0);
    kvd_ended ended = KVD_NEW(kvd_ended);
    uint32_t n;
    int fd, status;
    queue_put(q, &from, 'c', 0, BLOCKS);
    queue_put(q, &from, 'd', 0, BLOCKS);
    pid_t child = fork();
    if (child == 0) {
        char names[BLOCKS][KEY];
        kvd_page_keys k = keys_of(names, 'c', 0, 1);
        kvd_paged p = paged_of(&from, 0);
        const kvd_result got[] = {kvd_queue_put(q, &space, &k, NULL, &p, NULL, NULL, ERR),
                                  kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR),
                                  kvd_queue_poll(q, &ended, 1, &n, ERR),
                                  kvd_queue_wait(q, 1, 1000, ERR),
                                  kvd_queue_cancel(q, 2, ERR),
                                  kvd_queue_fd(q, &fd, ERR),
                                  kvd_queue_new(c, 0, &q, ERR)};
        for (size_t i = 0; i < sizeof(got) / sizeof(*got); i++)
            if (got[i] != KVD_ERR_PRECONDITION || !strstr(failure.text, "forked"))
                _exit(1 + (int)i);
        kvd_queue_free(&q);
        kvd_close(&c);
        _exit(0);
    }
    NEED(child > 0 && waitpid(child, &status, 0) == child && status == 0);
    NEED(next(q).result == KVD_SUCCESS && next(q).result == KVD_SUCCESS && !readable(q, 0));
    kvd_queue_free(&q);
    engine_free(&from);
}

// An engine's memory is kvd's too, and stops being so while two queues put and get in it: each call
// that has begun keeps it, those that come later have libkvd copy, and all are right.
static void registered(kvd_client *c)
{
    struct engine from = engine_new(5), plain = from, to = engine_new(6);
    kvd_buffer *buffers[2 * Q_LAYERS];
    kvd_queue *puts = queue_new(c, 0), *gets = queue_new(c, 0);
    uint32_t n = 0;
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++) {
            NEED(kvd_buffer_new(c, SIDE * 2, &buffers[n], ERR) == 0);
            from.side[v][i] = kvd_buffer_data(buffers[n++]);
            memcpy(from.side[v][i], plain.side[v][i], SIDE * 2);
        }
    kvd_paged all = paged_of(&from, 0);
    kvd_result there = kvd_pages_register(c, &all, ERR); // it is, unless kvd has a GPU
    NEED(there == KVD_SUCCESS || strstr(failure.text, "kvd runs on a GPU"));
    queue_put(puts, &from, 'r', 0, 6);
    NEED(next(puts).result == KVD_SUCCESS);
    for (uint32_t i = 1; i < 8; i++) {
        queue_put(puts, &from, 'r', 6 * i, 6);
        queue_get(gets, &to, 'r', 0, 6, NULL);
    }
    for (uint32_t i = 0; i < n; i++) {
        void *data = kvd_buffer_detach(&buffers[i]); // its memory stays
        NEED(data == from.side[i / Q_LAYERS][i % Q_LAYERS]);
    }
    for (uint32_t i = 1; i < 8; i++) {
        kvd_ended put = next(puts), get = next(gets);
        NEED(put.result == KVD_SUCCESS && get.result == KVD_SUCCESS);
    }
    queue_get(gets, &to, 'r', 0, BLOCKS, NULL);
    NEED(next(gets).result == KVD_SUCCESS && equal(&plain, &to, 0, BLOCKS));
    kvd_queue_free(&puts);
    kvd_queue_free(&gets);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            munmap(from.side[v][i], SIDE * 2);
    engine_free(&plain);
    engine_free(&to);
}

int queues(const char *address)
{
    atexit(go_on);
    kvd_client *c = open_pages(address);
    in_order(c);
    bounds(c);
    at_once(c);
    registered(c);
    in_a_child(c);
    kvd_close(&c);
    taken_back(address);
    open_client(address);
    kvd_queue *q;
    NEED(kvd_queue_new(client, 0, &q, ERR) == KVD_ERR_PRECONDITION);
    kvd_close(&client);
    return 0;
}

int queues_killed(const char *address)
{
    struct engine from = engine_new(8), to = engine_new(9);
    kvd_client *c = open_pages(address);
    kvd_queue *q = queue_new(c, 0);
    char line[16];
    uint32_t missed = 0;
    atexit(go_on);
    for (char i = 0; i < QUEUED; i++) {
        queue_put(q, &from, (char)('A' + i), 0, BLOCKS);
        if (i == QUEUED / 2) {
            NEED(next(q).result == KVD_SUCCESS);
            stop(address);
        }
    }
    printf("ready\n");
    fflush(stdout);
    NEED(fgets(line, sizeof(line), stdin)); // it was killed
    stopped = 0;
    for (uint64_t i = 2; i <= QUEUED; i++) {
        kvd_ended ended = next(q);
        NEED(ended.ticket == i);
        if (ended.result == KVD_SUCCESS)
            continue;
        failure = ended.failure;
        NEED(ended.result == KVD_ERR_UNAVAILABLE || ended.result == KVD_ERR_LOST);
        NEED(failure.text[0]);
        missed++;
    }
    printf("%u\n", missed);
    fflush(stdout);
    NEED(fgets(line, sizeof(line), stdin)); // it is there again
    kvd_ended put, get;
    for (int tries = 0; tries < 3; tries++) { // some may be told that the session is lost
        queue_put(q, &from, 'a', 0, 8);
        put = next(q);
        queue_get(q, &to, 'a', 0, 8, NULL);
        get = next(q);
        if (put.result == KVD_SUCCESS && get.result == KVD_SUCCESS)
            break;
        failure = put.result ? put.failure : get.failure;
        NEED(missed && (put.result == KVD_ERR_LOST || get.result == KVD_ERR_LOST));
    }
    NEED(put.result == KVD_SUCCESS && get.result == KVD_SUCCESS);
    NEED(equal(&from, &to, 0, 8));
    kvd_queue_free(&q);
    kvd_close(&c);
    engine_free(&from);
    engine_free(&to);
    return 0;
}

#ifdef KVD_EMULATED
static void copy_all(const struct engine *to, const struct engine *from, enum cudaMemcpyKind kind,
                     cudaStream_t stream)
{
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            NEED(cudaMemcpyAsync(to->side[v][i], from->side[v][i], SIDE * 2, kind, stream) ==
                 cudaSuccess);
}

// Tokens come late to the blocks that are put, and to the copy of those that were got: behind what
// is on the engine's stream is where a ticket begins, and before all that comes once it has ended.
static void put_and_get(kvd_queue *q, char first, const kvd_paged *p, const struct engine *given,
                        const struct engine *on_gpu, const struct engine *got, cudaStream_t stream)
{
    char names[BLOCKS][KEY];
    bool exact[BLOCKS];
    kvd_ended ended;
    memset(exact, true, sizeof(exact));
    kvd_page_keys k = keys_of(names, first, 0, BLOCKS);
    copy_all(on_gpu, given, cudaMemcpyHostToDevice, stream);
    NEED(kvd_queue_put(q, &space, &k, exact, p, NULL, NULL, ERR) == 0);
    ended = next(q);
    NEED(ended.result == KVD_SUCCESS);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            memset(on_gpu->side[v][i], 0, SIDE * 2);
    NEED(kvd_queue_get(q, &space, &k, p, NULL, NULL, ERR) == 0);
    ended = next(q);
    NEED(ended.result == KVD_SUCCESS);
    copy_all(got, on_gpu, cudaMemcpyDeviceToHost, stream);
    NEED(cudaStreamSynchronize(stream) == cudaSuccess && equal(given, got, 0, BLOCKS));
}

int queues_gpu(const char *address)
{
    struct engine given = engine_new(10), on_gpu = given, got = engine_new(11);
    kvd_client *c = open_pages(address);
    kvd_queue *q = queue_new(c, 0);
    kvd_ended ended;
    cudaStream_t stream;
    char names[BLOCKS][KEY];
    bool exact[BLOCKS];
    memset(exact, true, sizeof(exact));
    NEED(cudaStreamCreate(&stream) == cudaSuccess);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++) {
            void *memory;
            NEED(cudaMalloc(&memory, SIDE * 2) == cudaSuccess);
            on_gpu.side[v][i] = memory;
        }
    kvd_paged p = paged_of(&on_gpu, 0);
    p.on_gpu = true;
    p.stream = stream;
    put_and_get(q, 'g', &p, &given, &on_gpu, &got, stream);
    NEED(kvd_pages_register(c, &p, ERR) == 0); // kvd reads and writes it from now on
    put_and_get(q, 'r', &p, &given, &on_gpu, &got, stream);
    // No queue: the call waits for the stream itself, before kvd reads what is to be there.
    kvd_page_keys now = keys_of(names, 'n', 0, BLOCKS);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            memset(on_gpu.side[v][i], 0, SIDE * 2);
    copy_all(&on_gpu, &given, cudaMemcpyHostToDevice, stream);
    NEED(kvd_pages_put(c, &space, &now, exact, &p, NULL, ERR) == 0);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            memset(on_gpu.side[v][i], 0, SIDE * 2);
    NEED(kvd_pages_get(c, &space, &now, &p, NULL, ERR) == 0 && equal(&given, &on_gpu, 0, BLOCKS));
    NEED(kvd_pages_unregister(c, 1000, ERR) == 0 && kvd_pages_unregister(c, 0, ERR) == 0);
    put_and_get(q, 'u', &p, &given, &on_gpu, &got, stream);
    p.on_gpu = false; // as if it were the host's: the same memory here, and the same pages
    NEED(kvd_pages_register(c, &p, ERR) == KVD_ERR_INVALID &&
         strstr(failure.text, "memory of the host, and kvd runs on a GPU"));
    memset(on_gpu.side[0][0], 0, SIDE * 2);
    kvd_page_keys k = keys_of(names, 'g', 0, BLOCKS);
    NEED(kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR) == 0);
    ended = next(q);
    NEED(ended.result == KVD_SUCCESS && equal(&given, &on_gpu, 0, BLOCKS));
    p.on_gpu = true;
    p.k = (void *const *)given.side[0];
    NEED(kvd_pages_register(c, &p, ERR) == KVD_ERR_INVALID &&
         strstr(failure.text, "is not GPU memory of this process"));
    NEED(kvd_queue_get(q, &space, &k, &p, NULL, NULL, ERR) == KVD_ERR_INVALID &&
         strstr(failure.text, "no memory of the GPU"));
    p.k = NULL;
    NEED(kvd_pages_register(c, &p, ERR) == KVD_ERR_INVALID && strstr(failure.text, "k is NULL"));
    kvd_queue_free(&q);
    kvd_close(&c);
    engine_free(&given);
    engine_free(&got);
    for (int v = 0; v < 2; v++)
        for (int i = 0; i < Q_LAYERS; i++)
            cudaFree(on_gpu.side[v][i]);
    cudaStreamDestroy(stream);
    return 0;
}
#else
int queues_gpu(const char *address)
{
    (void)address;
    return 77; // nothing was tested
}
#endif

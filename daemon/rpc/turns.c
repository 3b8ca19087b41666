#include "daemon/rpc/turns.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utlist.h>

#include "proto/base.h"

enum {
    NUMBERS = 262144,                      // of descriptors
    CALL = KVD_TURN_CALL + KVD_TURN_FRAME, // headers and a message
    OWN = 4 * CALL,                        // what each link has for itself in a turn
    SETTLED = 2 * KVD_TURN_CALL,           // what it gets back for a call that is settled
    SHARED = 64 * CALL,                    // and all together besides
    LATE = 16,                             // calls that need not be settled for the next turn
    LASTS_NS = 20000000, // a turn of which calls never come to the loop: they were reset, say
    BYTES = 3,           // that count one, about
};

// All of this is the process's, as epoll_ctl is, and gRPC's threads.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { // where gRPC waits for a descriptor; under the lock
    int epoll;
    struct epoll_event event;
} waits[NUMBERS];
static struct kvd_turn *parked; // in the order in which they go on; under the lock
static void (*wake)(void *ctx); // under the lock
static void *wake_ctx;
static _Atomic uint32_t number = 1;
static _Atomic int32_t shared =
    SHARED;                   // what is left of it; less than 0: so much too much was read
static _Atomic int64_t begun; // calls
// The loop's: calls that are settled, those that are not expected any more, when the turn began.
static int64_t settled, lost;
static uint64_t since_ns;

// gRPC waits with this for what comes in: the linker puts the program's symbols before libc's.
__attribute__((visibility("default"))) int epoll_ctl(int epoll, int op, int fd,
                                                     struct epoll_event *event)
{
    pthread_mutex_lock(&lock);
    int rc = (int)syscall(SYS_epoll_ctl, epoll, op, fd, event);
    if (rc == 0 && op == EPOLL_CTL_ADD && event && fd < NUMBERS) {
        waits[fd].epoll = epoll;
        waits[fd].event = *event;
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

// Reports once more what is true of a descriptor, to who waits for changes.
static void report_again(int fd)
{
    if (fd < NUMBERS && waits[fd].event.events & (uint32_t)EPOLLET)
        syscall(SYS_epoll_ctl, waits[fd].epoll, EPOLL_CTL_MOD, fd, &waits[fd].event);
}

void kvd_turn_start(struct kvd_turn *t, int fd)
{
    *t = (struct kvd_turn){.fd = fd, .number = atomic_load(&number), .own = OWN};
    pthread_mutex_lock(&lock);
    if (fd < NUMBERS)
        waits[fd].event.events = 0;
    pthread_mutex_unlock(&lock);
}

// Whether the link has something left, in the turn that is now.
static bool has_left(struct kvd_turn *t)
{
    uint32_t now = atomic_load(&number);
    if (t->number != now) {
        t->number = now;
        atomic_store(&t->own, OWN);
    }
    return atomic_load(&t->own) > 0 || atomic_load(&shared) > 0;
}

bool kvd_turn_may_read(struct kvd_turn *t)
{
    if (atomic_load(&t->state) == KVD_TURN_RUNS && has_left(t))
        return true;
    pthread_mutex_lock(&lock);
    bool runs = atomic_load(&t->state) == KVD_TURN_RUNS;
    bool may = atomic_load(&t->state) == KVD_TURN_FREE || (runs && has_left(t));
    if (runs && !may) {
        atomic_store(&t->state, KVD_TURN_PARKED);
        DL_APPEND2(parked, t, previous, next);
        if (wake)
            wake(wake_ctx);
    }
    pthread_mutex_unlock(&lock);
    return may;
}

size_t kvd_turn_bytes(const struct kvd_turn *t)
{
    int32_t left = KVD_MAX(atomic_load(&t->own), atomic_load(&shared));
    return (size_t)KVD_MAX(left, CALL) * BYTES;
}

void kvd_turn_spend(struct kvd_turn *t, int n)
{
    if (atomic_load(&t->own) > 0)
        atomic_fetch_sub(&t->own, n);
    else
        atomic_fetch_sub(&shared, n);
}

void kvd_turn_begin_call(struct kvd_turn *t)
{
    kvd_turn_spend(t, KVD_TURN_CALL);
    atomic_fetch_add(&begun, 1);
}

// Gives a link another state; who waited for its turn is told. To be called under the lock.
static void change(struct kvd_turn *t, int state)
{
    int before = atomic_exchange(&t->state, state);
    if (before == KVD_TURN_PARKED)
        DL_DELETE2(parked, t, previous, next);
    if (before != KVD_TURN_RUNS && state != KVD_TURN_HELD)
        report_again(t->fd);
}

void kvd_turn_hold(struct kvd_turn *t)
{
    pthread_mutex_lock(&lock);
    change(t, KVD_TURN_HELD);
    pthread_mutex_unlock(&lock);
}

void kvd_turn_release(struct kvd_turn *t)
{
    pthread_mutex_lock(&lock);
    change(t, KVD_TURN_FREE);
    pthread_mutex_unlock(&lock);
}

void kvd_turns_init(void (*woken)(void *ctx), void *ctx)
{
    pthread_mutex_lock(&lock);
    wake = woken;
    wake_ctx = ctx;
    pthread_mutex_unlock(&lock);
}

void kvd_turn_settle_call(struct kvd_turn *t)
{
    settled++;
    if (atomic_load(&t->own) <= OWN - SETTLED)
        atomic_fetch_add(&t->own, SETTLED);
}

// As many go on as have something of what is shared, if they take no more than their own.
static void begin(uint64_t now_ns)
{
    atomic_store(&shared, SHARED);
    atomic_fetch_add(&number, 1);
    since_ns = now_ns;
    for (int i = 0; parked && i < SHARED / OWN; i++)
        change(parked, KVD_TURN_RUNS);
}

uint32_t kvd_turns_next(uint64_t now_ns)
{
    uint32_t wait = 0;
    pthread_mutex_lock(&lock);
    if (parked) {
        int64_t missing = atomic_load(&begun) - settled;
        bool over = now_ns - since_ns >= LASTS_NS;
        lost = over ? missing : KVD_MIN(lost, missing);
        if (missing - lost <= LATE)
            begin(now_ns);
        wait = parked || missing - lost > LATE ? LASTS_NS / 1000000 : 0;
    }
    pthread_mutex_unlock(&lock);
    return wait;
}

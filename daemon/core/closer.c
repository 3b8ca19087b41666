#include "daemon/core/closer.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>
#include <uthash.h>
#include <utlist.h>

#include "daemon/core/log.h"

enum { LONG_MS = 1000 }; // after which a thread gets a signal

enum what { CLOSE, DISCARD, HANG_UP };

struct item {
    enum what what;
    int fd;
    kvd_closed *done;
    void *arg;
    pthread_t thread; // that is at it
    uint64_t since;   // in ns
    struct item *prev, *next;
};

struct loop_side {
    uv_async_t over;
    uv_timer_t tick; // runs while there are items
    uint32_t handles;
};

// A user's. It is there while it has items.
struct lane {
    int64_t whose;
    struct item *waiting, *taken; // taken: threads are at them
    uint32_t n, n_taken;
    bool ready;        // it is in the list of those
    struct lane *next; // in that
    UT_hash_handle hh;
};

// The process's, as descriptors are, and never freed: a thread that hangs comes back whenever it
// likes.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static struct lane *lanes, *ready; // ready: a thread may take an item of it
static struct item *over;          // whose `done` is to be called
static uint32_t n_ready, threads, idle, uncharged;
static struct loop_side *side; // NULL: there is no loop, and nobody is told

// Without room for descriptors: the kernel drops them, and this thread waits.
static bool discard(int fd)
{
    char waste[4096];
    return recv(fd, waste, sizeof(waste), MSG_DONTWAIT | MSG_TRUNC) > 0;
}

static void let_go(const struct item *i)
{
    if (i->what == DISCARD)
        discard(i->fd);
    while (i->what == HANG_UP && discard(i->fd))
        continue;
    if (i->what != DISCARD)
        close(i->fd);
}

// -- threads. All under the lock, but for letting go --------------------------------------------

static void *closer(void *arg);

// Whoever sleeps wakes up, or another one begins. When there can be no more, what is ready waits
// for those that there are, and another is tried every second.
static void call_thread(void)
{
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, before;
    pthread_cond_signal(&more);
    if (n_ready <= idle || threads >= KVD_CLOSER_THREADS || pthread_attr_init(&attr))
        return;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    sigdelset(&all, SIGURG);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(&thread, &attr, closer, NULL);
    threads += rc == 0;
    if (rc)
        kvd_warning("no thread to close descriptors of workers: %s", strerror(rc));
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
}

static void make_ready(struct lane *l)
{
    if (!l->ready && l->waiting && l->n_taken < KVD_CLOSER_EACH) {
        l->ready = true;
        LL_APPEND(ready, l);
        n_ready++;
    }
    if (ready)
        call_thread();
}

// Of the lane whose turn it is, which is at the end of the list after that.
static struct item *take(struct lane **from)
{
    struct lane *l = ready;
    struct item *i = l->waiting;
    LL_DELETE(ready, l);
    n_ready--;
    l->ready = false;
    DL_DELETE(l->waiting, i);
    DL_APPEND(l->taken, i);
    l->n_taken++;
    i->thread = pthread_self();
    i->since = uv_hrtime();
    make_ready(l);
    *from = l;
    return i;
}

static void finish(struct lane *l, struct item *i)
{
    DL_DELETE(l->taken, i);
    l->n_taken--;
    l->n--;
    if (i->done) {
        LL_PREPEND(over, i);
        if (side)
            uv_async_send(&side->over);
    } else {
        uncharged--;
        free(i);
    }
    make_ready(l);
    if (l->n)
        return;
    HASH_DEL(lanes, l);
    free(l);
}

static void *closer(void *arg)
{
    (void)arg;
    pthread_mutex_lock(&lock);
    for (;;) {
        struct lane *l;
        while (!ready) {
            idle++;
            pthread_cond_wait(&more, &lock);
            idle--;
        }
        struct item *i = take(&l);
        pthread_mutex_unlock(&lock);
        let_go(i);
        pthread_mutex_lock(&lock);
        finish(l, i);
    }
    return NULL;
}

// -- what is to be let go of --------------------------------------------------------------------

static struct lane *lane_of(int64_t whose, bool make)
{
    struct lane *l;
    HASH_FIND(hh, lanes, &whose, sizeof(whose), l);
    if (l || !make)
        return l;
    l = calloc(1, sizeof(*l));
    if (!l)
        return NULL;
    l->whose = whose;
    HASH_ADD(hh, lanes, whose, sizeof(l->whose), l);
    return l;
}

// Has whoever hangs hang no more, if a signal can do that, and those work who could not begin.
static void on_tick(uv_timer_t *timer)
{
    const uint64_t now = uv_hrtime();
    const struct item *i;
    pthread_mutex_lock(&lock);
    for (const struct lane *l = lanes; l; l = l->hh.next)
        DL_FOREACH(l->taken, i)
    if (now - i->since >= (uint64_t)LONG_MS * 1000000)
        pthread_kill(i->thread, SIGURG);
    if (ready)
        call_thread();
    if (!lanes)
        uv_timer_stop(timer);
    pthread_mutex_unlock(&lock);
}

static void add(int64_t whose, const struct item *what)
{
    struct item *i = malloc(sizeof(*i));
    pthread_mutex_lock(&lock);
    struct lane *l = i ? lane_of(whose, true) : NULL;
    bool tell = what->done && !(l && side);
    if (l) {
        *i = *what;
        if (tell)
            i->done = NULL;
        DL_APPEND(l->waiting, i);
        l->n++;
        uncharged += !i->done;
        make_ready(l);
    }
    pthread_mutex_unlock(&lock);
    if (side && !uv_is_active((uv_handle_t *)&side->tick))
        uv_timer_start(&side->tick, on_tick, LONG_MS, LONG_MS);
    if (!l) { // it stays open: that costs a descriptor, and not the loop
        free(i);
        kvd_error("out of memory: a descriptor stays open uid=%" PRId64, whose);
    }
    if (tell) // kvd ends
        what->done(what->arg);
}

void kvd_closer_close(int64_t whose, int fd, kvd_closed *done, void *arg)
{
    add(whose, &(struct item){.what = CLOSE, .fd = fd, .done = done, .arg = arg});
}

void kvd_closer_discard(int64_t whose, int fd, kvd_closed *done, void *arg)
{
    add(whose, &(struct item){.what = DISCARD, .fd = fd, .done = done, .arg = arg});
}

// Whether nothing waits in a socket that is shut down, so nothing will. With SO_PASSCRED any
// message brings more than there is room for here, also an empty one, and the end of all does not.
static bool is_empty(int fd)
{
    int on = 1;
    struct msghdr msg = {0};
    if (setsockopt(fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)))
        return false;
    ssize_t n = recvmsg(fd, &msg, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && errno == ECONNRESET) // once, when the other end did not read all
        n = recvmsg(fd, &msg, MSG_PEEK | MSG_DONTWAIT);
    return n == 0 && !(msg.msg_flags & MSG_CTRUNC);
}

void kvd_closer_hang_up(int64_t whose, int fd, kvd_closed *done, void *arg)
{
    shutdown(fd, SHUT_RDWR);
    if (is_empty(fd)) {
        close(fd);
        if (done)
            done(arg);
        return;
    }
    add(whose, &(struct item){.what = HANG_UP, .fd = fd, .done = done, .arg = arg});
}

uint32_t kvd_closer_waiting(int64_t whose)
{
    pthread_mutex_lock(&lock);
    const struct lane *l = lane_of(whose, false);
    uint32_t n = l ? l->n : 0;
    pthread_mutex_unlock(&lock);
    return n;
}

uint32_t kvd_closer_uncharged(void)
{
    pthread_mutex_lock(&lock);
    uint32_t n = uncharged;
    pthread_mutex_unlock(&lock);
    return n;
}

// -- start and end ------------------------------------------------------------------------------

static void on_over(uv_async_t *async)
{
    struct item *i, *next;
    (void)async;
    pthread_mutex_lock(&lock);
    struct item *some = KVD_TAKE(over);
    pthread_mutex_unlock(&lock);
    LL_FOREACH_SAFE(some, i, next)
    {
        i->done(i->arg);
        free(i);
    }
}

static void on_signal(int number)
{
    (void)number; // that it came is enough
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    const struct sigaction nothing = {.sa_handler = on_signal};
    struct loop_side *s = calloc(1, sizeof(*s));
    if (!s || uv_async_init(&d->loop, &s->over, on_over)) {
        free(s);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    uv_timer_init(&d->loop, &s->tick);
    s->over.data = s->tick.data = s;
    s->handles = 2;
    sigaction(SIGURG, &nothing, NULL);
    pthread_mutex_lock(&lock);
    side = s;
    pthread_mutex_unlock(&lock);
    return KVD_OK;
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct loop_side *s = handle->data;
    if (--s->handles == 0)
        free(s);
}

// Whom the first of some items that has somebody is to tell. It tells nobody any more then.
static kvd_closed *take_done(struct item *items, void **arg)
{
    struct item *i;
    DL_FOREACH(items, i)
    {
        if (!i->done)
            continue;
        uncharged++;
        *arg = i->arg;
        return KVD_TAKE(i->done);
    }
    return NULL;
}

// The same of all that wait, or that threads are at.
static kvd_closed *take_any_done(void **arg)
{
    kvd_closed *done = NULL;
    pthread_mutex_lock(&lock);
    for (const struct lane *l = lanes; l && !done; l = l->hh.next) {
        done = take_done(l->waiting, arg);
        if (!done)
            done = take_done(l->taken, arg);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

static void warn(void)
{
    pthread_mutex_lock(&lock);
    for (const struct lane *l = lanes; l; l = l->hh.next)
        if (l->n_taken)
            kvd_warning("descriptors are still being closed: %u; a process that is left after this "
                        "waits for a FUSE file system of the user uid=%" PRId64,
                        l->n_taken, l->whose);
    pthread_mutex_unlock(&lock);
}

// Nobody waits for what hangs: who is to be told is told now.
static void end(struct kvd_daemon *d)
{
    kvd_closed *done;
    void *arg;
    (void)d;
    pthread_mutex_lock(&lock);
    struct loop_side *s = KVD_TAKE(side);
    pthread_mutex_unlock(&lock);
    if (!s)
        return;
    while ((done = take_any_done(&arg)))
        done(arg);
    on_over(&s->over);
    warn();
    uv_close((uv_handle_t *)&s->over, on_handle_closed);
    uv_close((uv_handle_t *)&s->tick, on_handle_closed);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    uint64_t n = 0;
    (void)d;
    pthread_mutex_lock(&lock);
    for (const struct lane *l = lanes; l; l = l->hh.next)
        n += l->n;
    pthread_mutex_unlock(&lock);
    kvd_metric(f, "kvd_descriptors_closing", "gauge",
               "Descriptors of workers, and messages with such, that are being let go of.",
               (double)n);
}

const struct kvd_part kvd_part_closer = {.init = init, .end = end, .metrics = metrics};

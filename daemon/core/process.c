#include "daemon/core/process.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>

enum {
    MANY_FILES = 262144,
    FEWEST_FILES = 40, // kvd has 20 with nobody there
    STACK_BYTES = 1 << 20,
    THREADS = 16, // of gRPC, libuv and kvd, besides the backend's
};

// Descriptors 0, 1 and 2 must be taken before anything opens one, or what gets the place of stderr
// gets the log too. Libraries open some before main, so this runs before their constructors, by
// system calls alone.
static void take_descriptors(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (syscall(SYS_fcntl, fd, F_GETFD) < 0 && errno == EBADF)
            (void)!syscall(SYS_openat, AT_FDCWD, "/dev/null", O_RDWR); // gets the lowest number: fd
}

__attribute__((section(".preinit_array"),
               used)) static void (*const before_all)(void) = take_descriptors;

static void set_signals(void)
{
    sigset_t none;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL); // SIGTERM may have been blocked by who started us
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); // writing beyond ulimit -f fails instead
}

static void raise_limit(int what, rlim_t to)
{
    struct rlimit r;
    if (getrlimit(what, &r) || r.rlim_cur == RLIM_INFINITY || r.rlim_cur >= to)
        return;
    r.rlim_cur = KVD_MIN(r.rlim_max, to);
    setrlimit(what, &r);
}

static void *wait_to_be_cancelled(void *arg)
{
    (void)arg;
    for (;;)
        pause();
    return NULL;
}

// gRPC does not get over a thread that it cannot start, so as many as it may want are tried.
static int try_threads(struct kvd_error *err)
{
    pthread_t threads[THREADS];
    int n = 0, rc = 0;
    while (n < THREADS && (rc = pthread_create(&threads[n], NULL, wait_to_be_cancelled, NULL)) == 0)
        n++;
    for (int i = 0; i < n; i++) {
        pthread_cancel(threads[i]);
        pthread_join(threads[i], NULL);
    }
    return rc == 0 ? KVD_OK
                   : kvd_fail(err, KVD_E_LIMIT,
                              "only %d of %d threads could be started: %s; raise the limit of "
                              "processes (TasksMax=, ulimit -u) or of memory (ulimit -v)",
                              n, THREADS, strerror(rc));
}

int kvd_process_prepare(struct kvd_error *err)
{
    struct rlimit r;
    set_signals();
    raise_limit(RLIMIT_NOFILE, MANY_FILES);
    raise_limit(RLIMIT_STACK, STACK_BYTES);
    if (getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < FEWEST_FILES)
        return kvd_fail(err, KVD_E_LIMIT,
                        "the limit of open files is %llu; kvd wants at least %d (LimitNOFILE=, "
                        "ulimit -n)",
                        (unsigned long long)r.rlim_cur, FEWEST_FILES);
    if (getrlimit(RLIMIT_STACK, &r) == 0 && r.rlim_cur < STACK_BYTES)
        return kvd_fail(err, KVD_E_LIMIT,
                        "the limit of the stack is %llu bytes; kvd wants at least %d (LimitSTACK=, "
                        "ulimit -s)",
                        (unsigned long long)r.rlim_cur, STACK_BYTES);
    return try_threads(err);
}

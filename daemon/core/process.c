#include "daemon/core/process.h"

#include <dirent.h>
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
                        "the limit of open files is %" PRIu64
                        "; kvd wants at least %d (LimitNOFILE=, ulimit -n)",
                        r.rlim_cur, FEWEST_FILES);
    if (getrlimit(RLIMIT_STACK, &r) == 0 && r.rlim_cur < STACK_BYTES)
        return kvd_fail(err, KVD_E_LIMIT,
                        "the limit of the stack is %" PRIu64
                        " bytes; kvd wants at least %d (LimitSTACK=, ulimit -s)",
                        r.rlim_cur, STACK_BYTES);
    return try_threads(err);
}

// -- metrics ------------------------------------------------------------------------------------

// A number of /proc/self/FILE after "KEY", or 0.
static double proc_number(const char *path, const char *key)
{
    char line[512];
    double value = 0;
    FILE *f KVD_FCLOSE = fopen(path, "re");
    while (f && fgets(line, sizeof(line), f))
        if (strncmp(line, key, strlen(key)) == 0)
            value = strtod(line + strlen(key), NULL);
    return value;
}

// When the process began, in Unix time: field 22 of stat, in clock ticks after the machine's start.
static double process_start(void)
{
    char text[1024];
    FILE *f KVD_FCLOSE = fopen("/proc/self/stat", "re");
    size_t n = f ? fread(text, 1, sizeof(text) - 1, f) : 0;
    text[n] = '\0';
    char *at = strrchr(text, ')'); // after the name, which may have spaces, comes field 3
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return proc_number("/proc/stat", "btime ") +
           (at ? strtod(at, NULL) / (double)sysconf(_SC_CLK_TCK) : 0);
}

static uint32_t open_descriptors(void)
{
    uint32_t n = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder))
        n++;
    if (folder)
        closedir(folder);
    return n > 3 ? n - 3 : 0; // ".", "..", and the folder's own
}

// Under the names that Prometheus' own clients have.
static void metrics(struct kvd_daemon *d, FILE *f)
{
    (void)d;
    struct rlimit limit = {0};
    size_t rss = 0;
    uv_rusage_t ru;
    uv_resident_set_memory(&rss);
    uv_getrusage(&ru);
    getrlimit(RLIMIT_NOFILE, &limit);
    kvd_metric(f, "process_cpu_seconds_total", "counter",
               "Total user and system CPU time spent in seconds.",
               (double)(ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) +
                   (double)(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) / 1e6);
    kvd_metric(f, "process_resident_memory_bytes", "gauge", "Resident memory size in bytes.",
               (double)rss);
    kvd_metric(f, "process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.",
               proc_number("/proc/self/status", "VmSize:") * 1024);
    kvd_metric(f, "process_open_fds", "gauge", "Number of open file descriptors.",
               open_descriptors());
    kvd_metric(f, "process_max_fds", "gauge", "Maximum number of open file descriptors.",
               (double)limit.rlim_cur);
    kvd_metric(f, "process_threads", "gauge", "Number of OS threads in the process.",
               proc_number("/proc/self/status", "Threads:"));
    kvd_metric(f, "process_start_time_seconds", "gauge",
               "Start time of the process since unix epoch in seconds.", process_start());
}

const struct kvd_part kvd_part_process = {.metrics = metrics};

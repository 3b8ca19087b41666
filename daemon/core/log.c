#include "daemon/core/log.h"

#include <poll.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <time.h>

#include "proto/base.h"

static _Atomic int current = KVD_LOG_INFO;
static const char *const names[] = {
    [KVD_LOG_ERROR] = "error", [KVD_LOG_WARNING] = "warning", [KVD_LOG_NOTICE] = "notice",
    [KVD_LOG_INFO] = "info",   [KVD_LOG_DEBUG] = "debug",
};

void kvd_log_set_level(enum kvd_log_level level)
{
    atomic_store(&current, (int)level);
}

enum kvd_log_level kvd_log_get_level(void)
{
    return (enum kvd_log_level)atomic_load_explicit(&current, memory_order_relaxed);
}

int kvd_log_level_parse(const char *name)
{
    for (int i = KVD_LOG_ERROR; i <= KVD_LOG_DEBUG; i++)
        if (strcmp(names[i], name) == 0)
            return i;
    return -1;
}

const char *kvd_log_level_name(enum kvd_log_level level)
{
    return names[level];
}

// Nobody waits for a log: a line that its reader has no room for, or that cannot be written, is
// lost and counted.
static void put(const char *line, size_t len)
{
    static _Atomic uint64_t lost;
    struct pollfd p = {.fd = STDERR_FILENO, .events = POLLOUT};
    char note[64];
    if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT)) {
        atomic_fetch_add(&lost, 1);
        return;
    }
    uint64_t before = atomic_exchange(&lost, 0);
    int n = before
                ? snprintf(note, sizeof(note), "(%" PRIu64 " lines of the log were lost)\n", before)
                : 0;
    bool ok = n == 0 || write(STDERR_FILENO, note, (size_t)n) == n;
    if (!ok || write(STDERR_FILENO, line, len) < 0)
        atomic_fetch_add(&lost, before + 1);
}

void kvd_log_at(enum kvd_log_level level, const char *fmt, ...)
{
    char line[1024];
    int n;
    if (getenv("JOURNAL_STREAM")) {
        n = snprintf(line, sizeof(line), "<%d>", (int)level);
    } else {
        struct timespec ts;
        struct tm tm;
        clock_gettime(CLOCK_REALTIME, &ts);
        gmtime_r(&ts.tv_sec, &tm);
        n = (int)strftime(line, sizeof(line), "%Y-%m-%dT%H:%M:%S", &tm);
        n += snprintf(line + n, sizeof(line) - (size_t)n, ".%03ldZ %-7s ", ts.tv_nsec / 1000000,
                      names[level]);
    }
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)KVD_MIN(n + KVD_MAX(m, 0), (int)sizeof(line) - 2);
    // What a client said must not forge a second line.
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)line[i] < ' ')
            line[i] = ' ';
    line[len++] = '\n';
    put(line, len);
}

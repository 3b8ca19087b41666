// Structured logs on stderr: one line a message, "key=value" pairs after it. Under systemd lines
// carry journald's priority prefix and no time; otherwise a timestamp. Any thread.
#ifndef KVD_DAEMON_LOG_H
#define KVD_DAEMON_LOG_H

enum kvd_log_level {
    KVD_LOG_ERROR = 3, // syslog's numbers
    KVD_LOG_WARNING = 4,
    KVD_LOG_NOTICE = 5,
    KVD_LOG_INFO = 6,
    KVD_LOG_DEBUG = 7,
};

void kvd_log_set_level(enum kvd_log_level level);
enum kvd_log_level kvd_log_get_level(void);
// The level of that name, or -1.
int kvd_log_level_parse(const char *name);
const char *kvd_log_level_name(enum kvd_log_level level);

__attribute__((format(printf, 2, 3))) void kvd_log_at(enum kvd_log_level level, const char *fmt,
                                                      ...);

#define kvd_log(level, ...)                                                                        \
    do {                                                                                           \
        if ((level) <= kvd_log_get_level())                                                        \
            kvd_log_at((level), __VA_ARGS__);                                                      \
    } while (0)
#define kvd_error(...)   kvd_log(KVD_LOG_ERROR, __VA_ARGS__)
#define kvd_warning(...) kvd_log(KVD_LOG_WARNING, __VA_ARGS__)
#define kvd_notice(...)  kvd_log(KVD_LOG_NOTICE, __VA_ARGS__)
#define kvd_info(...)    kvd_log(KVD_LOG_INFO, __VA_ARGS__)
#define kvd_debug(...)   kvd_log(KVD_LOG_DEBUG, __VA_ARGS__)

#endif

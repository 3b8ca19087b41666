#include "daemon/core/keep.h"

#include <errno.h>
#include <fcntl.h>

#include "daemon/core/keeper.h"
#include "daemon/core/log.h"
#ifdef KVD_SYSTEMD
#include <systemd/sd-daemon.h>
#endif

#define PROBE "kvd-probe" // a name

struct held {
    char name[sizeof(((struct kvd_keeper_message *)0)->name)];
    int fd;
};

struct kvd_keep {
    int keeper; // its socket; -1: systemd
    // Whether systemd does hold what it is given: the read end of a pipe whose other end it has
    // got. Who takes no descriptors closes it.
    uv_poll_t probe;
    int probe_fd; // -1: none
    bool holds_nothing;
    struct held *held;
    uint32_t n, cap;
};

// -- who holds ----------------------------------------------------------------------------------

static int keeper_socket(void)
{
    const char *env = getenv(KVD_KEEPER_ENV);
    int fd = env ? atoi(env) : -1;
    return env && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0 ? fd : -1;
}

bool kvd_keep_possible(void)
{
#ifdef KVD_SYSTEMD
    if (getenv("NOTIFY_SOCKET"))
        return true;
#endif
    return getenv(KVD_KEEPER_ENV) != NULL;
}

void kvd_keep_exec(char **argv)
{
    static const char name[] = "kvd-keeper";
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - sizeof(name));
    char **args = NULL;
    size_t argc = 0;
    while (argv[argc])
        argc++;
    args = calloc(argc + 2, sizeof(*args));
    if (n <= 0 || !args)
        return;
    self[n] = '\0';
    char path[sizeof(self)];
    snprintf(path, sizeof(path), "%s", self);
    char *slash = strrchr(path, '/');
    snprintf(slash + 1, sizeof(path) - (size_t)(slash + 1 - path), "%s", name);
    args[0] = path;
    args[1] = self;
    memcpy(args + 2, argv + 1, (argc - 1) * sizeof(*args));
    execv(path, args);
    kvd_error("cannot become %s: %s; keep wants kvd-keeper beside kvd, or systemd (a unit with "
              "Type=notify), to hold what is to outlive it",
              path, strerror(errno));
    free(args);
}

bool kvd_keep_on(const struct kvd_daemon *d)
{
    return d->keep != NULL;
}

// -- telling ------------------------------------------------------------------------------------

static void tell_keeper(struct kvd_keep *k, enum kvd_keeper_op op, const char *name, int fd)
{
    if (!kvd_keeper_send(k->keeper, op, name, fd))
        kvd_error("kvd-keeper cannot be told of %s: %s; it will not outlive this process", name,
                  strerror(errno));
}

#ifdef KVD_SYSTEMD
static void tell_systemd(enum kvd_keeper_op op, const char *name, int fd)
{
    char text[96];
    if (op == KVD_KEEPER_READY)
        return;
    snprintf(text, sizeof(text), "FDSTOREREMOVE=1\nFDNAME=%s", name);
    int rc = sd_notify(0, text);
    if (op == KVD_KEEPER_PUT) {
        snprintf(text, sizeof(text), "FDSTORE=1\nFDNAME=%s", name);
        rc = sd_pid_notify_with_fds(0, 0, text, &fd, 1);
    }
    if (rc < 0)
        kvd_error("systemd cannot be told of %s: %s; it will not outlive this process", name,
                  strerror(-rc));
}
#endif

static void tell(struct kvd_daemon *d, enum kvd_keeper_op op, const char *name, int fd)
{
    struct kvd_keep *k = d->keep;
    if (!k)
        return;
    if (k->keeper >= 0)
        tell_keeper(k, op, name, fd);
#ifdef KVD_SYSTEMD
    else
        tell_systemd(op, name, fd);
#endif
}

void kvd_keep_put(struct kvd_daemon *d, const char *name, int fd)
{
    tell(d, KVD_KEEPER_PUT, name, fd);
}

void kvd_keep_drop(struct kvd_daemon *d, const char *name)
{
    tell(d, KVD_KEEPER_DROP, name, -1);
}

void kvd_keep_ready(struct kvd_daemon *d)
{
    tell(d, KVD_KEEPER_READY, "", -1);
}

// -- whether it is held -------------------------------------------------------------------------

#ifdef KVD_SYSTEMD
static void on_probe(uv_poll_t *poll, int status, int events)
{
    struct kvd_daemon *d = poll->data;
    (void)status;
    (void)events;
    uv_poll_stop(poll);
    d->keep->holds_nothing = true;
    kvd_error(
        "keep holds nothing: what listens at NOTIFY_SOCKET gives up descriptors. Under systemd "
        "the unit wants FileDescriptorStoreMax; elsewhere, as in a container, unset "
        "NOTIFY_SOCKET, and kvd-keeper holds them");
}

static int probe_systemd(struct kvd_daemon *d, struct kvd_error *err)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        return kvd_fail(err, KVD_E_INTERNAL, "cannot make a pipe: %s", strerror(errno));
    d->keep->probe_fd = ends[0];
    tell_systemd(KVD_KEEPER_PUT, PROBE, ends[1]);
    close(ends[1]);
    if (uv_poll_init(&d->loop, &d->keep->probe, ends[0])) {
        close(KVD_TAKE_FD(d->keep->probe_fd));
        return kvd_fail(err, KVD_E_INTERNAL, "cannot watch a pipe");
    }
    d->keep->probe.data = d;
    uv_poll_start(&d->keep->probe, UV_READABLE | UV_DISCONNECT, on_probe);
    return KVD_OK;
}
#endif

static void end(struct kvd_daemon *d)
{
    struct kvd_keep *k = d->keep;
    if (!k || k->probe_fd < 0 || uv_is_closing((uv_handle_t *)&k->probe))
        return;
    uv_close((uv_handle_t *)&k->probe, NULL);
    close(k->probe_fd);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(
        f, "kvd_keep_unheld", "gauge",
        "Whether keep is set and neither systemd nor kvd-keeper holds what is to outlive kvd.",
        d->keep && d->keep->holds_nothing);
}

// -- what is held -------------------------------------------------------------------------------

static int add(struct kvd_keep *k, const char *name, int fd, struct kvd_error *err)
{
    if (k->n == k->cap) {
        uint32_t cap = k->cap ? 2 * k->cap : 64;
        struct held *grown = realloc(k->held, cap * sizeof(*grown));
        if (!grown) {
            close(fd);
            return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        }
        k->held = grown;
        k->cap = cap;
    }
    struct held *h = &k->held[k->n++];
    snprintf(h->name, sizeof(h->name), "%s", name);
    h->fd = fd;
    return KVD_OK;
}

int kvd_keep_take(struct kvd_daemon *d, const char *name)
{
    struct kvd_keep *k = d->keep;
    for (uint32_t i = 0; k && i < k->n; i++)
        if (strcmp(k->held[i].name, name) == 0 && k->held[i].fd >= 0)
            return KVD_TAKE_FD(k->held[i].fd);
    return -1;
}

// All of it, or all but the marks.
static void drop_held(struct kvd_daemon *d, bool all)
{
    struct kvd_keep *k = d->keep;
    for (uint32_t i = 0; k && i < k->n; i++) {
        if (k->held[i].fd < 0 ||
            (!all && strncmp(k->held[i].name, KVD_KEEP_MARK, strlen(KVD_KEEP_MARK)) == 0))
            continue;
        close(KVD_TAKE_FD(k->held[i].fd));
        kvd_keep_drop(d, k->held[i].name);
    }
}

void kvd_keep_drop_rest(struct kvd_daemon *d)
{
    drop_held(d, true);
}

static int ask_keeper(struct kvd_keep *k, struct kvd_error *err)
{
    for (;;) {
        struct kvd_keeper_message m;
        int fd;
        if (kvd_keeper_receive(k->keeper, 0, &m, &fd) != sizeof(m) ||
            (m.op != KVD_KEEPER_HELD && m.op != KVD_KEEPER_END) ||
            (m.op == KVD_KEEPER_HELD && fd < 0))
            return kvd_fail(err, KVD_E_INTERNAL, "kvd-keeper does not tell what it holds: %s",
                            strerror(errno));
        if (m.op == KVD_KEEPER_END)
            return KVD_OK;
        if (add(k, m.name, fd, err))
            return KVD_E_INTERNAL;
    }
}

static int ask_systemd(struct kvd_keep *k, struct kvd_error *err)
{
    int rc = KVD_OK;
#ifdef KVD_SYSTEMD
    char **names = NULL;
    int n = sd_listen_fds_with_names(1, &names);
    for (int i = 0; i < n; i++) {
        if (rc == KVD_OK)
            rc = add(k, names[i], SD_LISTEN_FDS_START + i, err);
        free(names[i]);
    }
    free(names);
#else
    (void)k;
    (void)err;
#endif
    return rc;
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    if (strcmp(d->config.keep, "no") == 0)
        return KVD_OK;
    d->keep = calloc(1, sizeof(*d->keep));
    if (!d->keep)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    d->keep->probe_fd = -1;
    d->keep->keeper = keeper_socket();
    int rc = d->keep->keeper >= 0 ? ask_keeper(d->keep, err) : ask_systemd(d->keep, err);
    if (rc == KVD_OK && strcmp(d->config.keep, "fresh") == 0)
        drop_held(d, false);
#ifdef KVD_SYSTEMD
    if (rc == KVD_OK && d->keep->keeper < 0) {
        int old = kvd_keep_take(d, PROBE); // of the kvd before
        kvd_cleanup_close(&old);
        rc = probe_systemd(d, err);
    }
#endif
    return rc;
}

static void deinit(struct kvd_daemon *d)
{
    struct kvd_keep *k = KVD_TAKE(d->keep);
    if (!k)
        return;
    for (uint32_t i = 0; i < k->n; i++)
        if (k->held[i].fd >= 0)
            close(k->held[i].fd);
    free(k->held);
    free(k);
}

const struct kvd_part kvd_part_keep = {
    .init = init, .end = end, .deinit = deinit, .metrics = metrics};

#include "daemon/rpc/listen.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <utlist.h>

#include "daemon/core/closer.h"
#include "daemon/core/config_load.h"
#include "daemon/rpc/meter.h"

enum {
    ACCEPT_AT_ONCE = 8, // then others have their turn
    REST_MS = 50,       // of a listener for which there was no descriptor
    SHORT_MS = 2000,    // how long descriptors count as short after that
    BACKLOG = 512,
};

struct kvd_listener {
    struct kvd_daemon *d;
    enum kvd_listen_for what;
    int fd;
    char path[128]; // "" for TCP
    kvd_accepted *accepted;
    uv_poll_t poll;
    uv_timer_t rest;
    uint32_t handles;
    struct kvd_listener *next;
};

// The descriptor in reserve and when it was used last. They are the process's, as descriptors are.
static int reserve = -1;
static uint64_t short_ns;

static bool is_shortage(int e)
{
    return e == EMFILE || e == ENFILE || e == ENOMEM || e == ENOBUFS;
}

static void note_shortage(int e)
{
    uint64_t now = uv_hrtime(), before = short_ns;
    short_ns = now;
    if (!before || now - before > 1000000000)
        kvd_warning("new connections are hung up on: %s%s", strerror(e),
                    e == EMFILE ? "; raise the limit of open files (LimitNOFILE=, ulimit -n)" : "");
}

static int accept_now(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    kvd_meter_forget(fd);
    return fd;
}

// Hangs up. Over a unix socket descriptors may have been sent already.
static void hang_up(const struct kvd_listener *l, int fd)
{
    struct ucred peer = {.uid = (uid_t)-1};
    socklen_t len = sizeof(peer);
    if (!l->path[0]) {
        close(fd);
        return;
    }
    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len);
    kvd_closer_hang_up(peer.uid, fd, NULL, NULL);
}

// Accepts with the reserve and hangs up. False: nobody waits, or not even that was possible.
static bool turn_away(const struct kvd_listener *l)
{
    if (reserve >= 0)
        close(reserve);
    int fd = accept_now(l->fd);
    if (fd >= 0)
        hang_up(l, fd);
    reserve = open("/dev/null", O_RDONLY | O_CLOEXEC);
    return fd >= 0;
}

static void on_acceptable(uv_poll_t *poll, int status, int events);

static void on_rested(uv_timer_t *timer)
{
    struct kvd_listener *l = timer->data;
    uv_poll_start(&l->poll, UV_READABLE, on_acceptable);
}

static void rest(struct kvd_listener *l)
{
    uv_poll_stop(&l->poll);
    uv_timer_start(&l->rest, on_rested, REST_MS, 0);
}

static void on_acceptable(uv_poll_t *poll, int status, int events)
{
    struct kvd_listener *l = poll->data;
    (void)status;
    (void)events;
    // Who is hung up on could leave a descriptor behind, again and again.
    if (l->path[0] && kvd_closer_uncharged() > KVD_CLOSER_MOST) {
        rest(l);
        return;
    }
    if (reserve < 0) // its place was not free yet
        reserve = open("/dev/null", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < ACCEPT_AT_ONCE; i++) {
        int fd = accept_now(l->fd);
        if (fd >= 0) {
            l->accepted(l->d, fd);
            continue;
        }
        if (errno == EAGAIN)
            return;
        if (errno == EINTR || errno == ECONNABORTED)
            continue;
        note_shortage(errno);
        if (is_shortage(errno))
            while (i++ < ACCEPT_AT_ONCE && turn_away(l))
                continue;
        rest(l);
        return;
    }
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct kvd_listener *l = handle->data;
    if (--l->handles == 0)
        free(l);
}

// Takes a listening socket into the loop; fd is the listener's from here on, also on failure.
static int add(struct kvd_daemon *d, enum kvd_listen_for what, int fd, const char *path,
               kvd_accepted *accepted, struct kvd_error *err)
{
    if (reserve < 0)
        reserve = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct kvd_listener *l = calloc(1, sizeof(*l));
    if (!l || uv_poll_init(&d->loop, &l->poll, fd)) {
        free(l);
        close(fd);
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    }
    l->d = d;
    l->what = what;
    l->fd = fd;
    snprintf(l->path, sizeof(l->path), "%s", path);
    l->accepted = accepted;
    uv_timer_init(&d->loop, &l->rest);
    l->poll.data = l->rest.data = l;
    l->handles = 2;
    uv_poll_start(&l->poll, UV_READABLE, on_acceptable);
    LL_PREPEND(d->listeners, l);
    return KVD_OK;
}

// Access to a unix socket: mode and group as configured.
static int grant_access(const struct kvd_config *c, const char *path, struct kvd_error *err)
{
    if (chmod(path, (mode_t)c->socket_mode))
        return kvd_fail(err, -errno, "cannot set the mode of %s: %s", path, strerror(errno));
    if (!c->socket_group[0])
        return KVD_OK;
    const struct group *gr = getgrnam(c->socket_group);
    if (!gr || chown(path, (uid_t)-1, gr->gr_gid))
        return kvd_fail(err, KVD_E_INVALID, "cannot give %s to the group %s: %s", path,
                        c->socket_group, gr ? strerror(errno) : "there is no such group");
    return KVD_OK;
}

int kvd_listen_unix(struct kvd_daemon *d, enum kvd_listen_for what, const char *path, int type,
                    kvd_accepted *accepted, struct kvd_error *err)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if ((size_t)snprintf(addr.sun_path, sizeof(addr.sun_path), "%s", path) >= sizeof(addr.sun_path))
        return kvd_fail(err, KVD_E_INVALID, "%s: a socket's path is too long", path);
    int fd KVD_CLOSE = socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink(path); // stale: the lock beside the gRPC socket is ours
    // Nobody but us may connect before the mode is set.
    mode_t mask = umask(0177);
    bool ok = fd >= 0 && bind(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0;
    int e = errno;
    umask(mask);
    if (!ok)
        return kvd_fail(err, KVD_E_UNAVAILABLE, "cannot listen on %s: %s", path, strerror(e));
    int rc = grant_access(&d->config, path, err), off = 0;
    // gRPC asks for no descriptors. Connections inherit this, and who sends some gets EPERM.
    if (type == SOCK_STREAM)
        setsockopt(fd, SOL_SOCKET, KVD_SO_PASSRIGHTS, &off, sizeof(off));
    if (rc == KVD_OK && listen(fd, BACKLOG))
        rc = kvd_fail(err, -errno, "cannot listen on %s: %s", path, strerror(errno));
    if (rc == KVD_OK)
        rc = add(d, what, KVD_TAKE_FD(fd), path, accepted, err);
    if (rc)
        unlink(path);
    return rc;
}

static int resolve(const char *where, struct addrinfo **out, struct kvd_error *err)
{
    char host[KVD_CONFIG_TEXT], service[8];
    uint32_t port;
    if (kvd_config_host_port(where, host, sizeof(host), &port))
        return kvd_fail(err, KVD_E_INVALID, "'%s' is not possible; it wants HOST:PORT", where);
    snprintf(service, sizeof(service), "%u", port);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    int rc = getaddrinfo(host[0] ? host : NULL, service, &hints, out);
    return rc ? kvd_fail(err, KVD_E_INVALID, "'%s': %s", where, gai_strerror(rc)) : KVD_OK;
}

static int tcp_socket(const struct addrinfo *ai, uint16_t *port)
{
    int fd KVD_CLOSE = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int on = 1;
    struct sockaddr_storage addr;
    socklen_t len = sizeof(addr);
    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)); // accepted ones have it too
    if (ai->ai_family == AF_INET6)
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on));
    if (bind(fd, ai->ai_addr, ai->ai_addrlen) || listen(fd, BACKLOG) ||
        getsockname(fd, (struct sockaddr *)&addr, &len))
        return -1;
    *port = ntohs(addr.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&addr)->sin6_port
                                             : ((struct sockaddr_in *)&addr)->sin_port);
    return KVD_TAKE_FD(fd);
}

int kvd_listen_tcp(struct kvd_daemon *d, enum kvd_listen_for what, const char *where,
                   kvd_accepted *accepted, uint16_t *port, struct kvd_error *err)
{
    struct addrinfo *all = NULL;
    uint16_t got = 0;
    bool any = false;
    int rc = resolve(where, &all, err);
    if (rc)
        return rc;
    for (const struct addrinfo *ai = all; ai && rc == KVD_OK; ai = ai->ai_next) {
        int fd = tcp_socket(ai, &got);
        if (fd >= 0) {
            rc = add(d, what, fd, "", accepted, err);
            any = true;
        } else if (errno != EAFNOSUPPORT &&
                   errno != EADDRNOTAVAIL) { // IPv6 is off: the rest will do
            rc =
                kvd_fail(err, KVD_E_UNAVAILABLE, "cannot listen on %s: %s", where, strerror(errno));
        }
        if (strcmp(strrchr(where, ':'), ":0") == 0)
            break; // one port, whichever
    }
    freeaddrinfo(all);
    if (rc == KVD_OK && !any)
        rc = kvd_fail(err, KVD_E_UNAVAILABLE, "cannot listen on %s: no address of it is here",
                      where);
    if (port)
        *port = got;
    return rc;
}

void kvd_listen_close(struct kvd_daemon *d, enum kvd_listen_for what)
{
    struct kvd_listener *l, *next;
    LL_FOREACH_SAFE(d->listeners, l, next)
    {
        if (l->what != what)
            continue;
        LL_DELETE(d->listeners, l);
        uv_poll_stop(&l->poll);
        if (l->path[0]) {
            unlink(l->path);
            // Who was not accepted yet may have sent descriptors. Nobody connects any more.
            kvd_closer_hang_up(-1, l->fd, NULL, NULL);
        } else {
            close(l->fd);
        }
        uv_close((uv_handle_t *)&l->poll, on_handle_closed);
        uv_close((uv_handle_t *)&l->rest, on_handle_closed);
    }
}

bool kvd_listen_short(const struct kvd_daemon *d)
{
    (void)d;
    return short_ns && uv_hrtime() - short_ns < (uint64_t)SHORT_MS * 1000000;
}

// kvd-keeper: starts kvd, holds what is to outlive it, and starts it again when it ends.
//
// usage: kvd-keeper KVD [ARGUMENT...], which is what `kvd --keep` becomes without systemd. It knows
// nothing of what it holds: descriptors by name (core/keeper.h). SIGTERM and SIGINT are passed on
// and end it too; SIGHUP is passed on. When kvd ends by itself, by a signal or with any code, it is
// started again: at once if it had served, with growing delays if it did not, or ended soon again
// and again; only a first kvd that never served is not. kvd does not outlive it.
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <time.h>
#include <unistd.h>

#include "daemon/core/keeper.h"

// kvd that ends within SOON_MS is started at once no more than SOON_ENDS times in a row.
enum { FIRST_DELAY_MS = 50, LAST_DELAY_MS = 5000, SOON_MS = 1000, SOON_ENDS = 30 };

struct held {
    char name[sizeof(((struct kvd_keeper_message *)0)->name)];
    int fd;
};

struct keeper {
    char **command;
    struct held *held;
    size_t n, cap;
    sigset_t signals;
    int signal_fd;
    int socket; // to kvd
    pid_t kvd;  // 0: it has ended
    int status; // how
    bool ready; // it has served
    bool stopping;
};

static void die(const char *what)
{
    fprintf(stderr, "kvd-keeper: %s: %s\n", what, strerror(errno));
    exit(EX_OSERR);
}

// -- what is held -------------------------------------------------------------------------------

static struct held *find(struct keeper *k, const char *name)
{
    for (size_t i = 0; i < k->n; i++)
        if (strcmp(k->held[i].name, name) == 0)
            return &k->held[i];
    return NULL;
}

static void put(struct keeper *k, const char *name, int fd)
{
    struct held *h = find(k, name);
    if (h) {
        close(h->fd);
        h->fd = fd;
        return;
    }
    if (k->n == k->cap) {
        size_t cap = k->cap ? 2 * k->cap : 64;
        struct held *grown = realloc(k->held, cap * sizeof(*grown));
        if (!grown)
            die("cannot hold another descriptor");
        k->held = grown;
        k->cap = cap;
    }
    h = &k->held[k->n++];
    snprintf(h->name, sizeof(h->name), "%s", name);
    h->fd = fd;
}

static void drop(struct keeper *k, const char *name)
{
    struct held *h = find(k, name);
    if (!h)
        return;
    close(h->fd);
    *h = k->held[--k->n];
}

// -- messages -----------------------------------------------------------------------------------

// False: there is no more for now, or ever.
static bool receive(struct keeper *k)
{
    struct kvd_keeper_message m;
    int fd;
    ssize_t n = kvd_keeper_receive(k->socket, MSG_DONTWAIT, &m, &fd);
    if (n <= 0)
        return false;
    bool whole = n == (ssize_t)sizeof(m);
    if (whole && m.op == KVD_KEEPER_PUT && fd >= 0) {
        put(k, m.name, fd);
        return true;
    }
    if (whole && m.op == KVD_KEEPER_PUT)
        fprintf(stderr,
                "kvd-keeper: no descriptor is free to hold %s, which is lost if kvd ends; raise "
                "the limit of open files (ulimit -n)\n",
                m.name);
    if (whole && m.op == KVD_KEEPER_DROP)
        drop(k, m.name);
    if (whole && m.op == KVD_KEEPER_READY)
        k->ready = true;
    if (fd >= 0)
        close(fd);
    return true;
}

// One for each extent and index, of which there may be thousands.
static void raise_limit(void)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0) {
        r.rlim_cur = r.rlim_max;
        setrlimit(RLIMIT_NOFILE, &r);
    }
}

// -- kvd ----------------------------------------------------------------------------------------

static void run_kvd(struct keeper *k, int its, pid_t self)
{
    char number[16];
    snprintf(number, sizeof(number), "%d", its);
    sigprocmask(SIG_UNBLOCK, &k->signals, NULL);
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != self || fcntl(its, F_SETFD, 0) || setenv(KVD_KEEPER_ENV, number, 1))
        _exit(EX_OSERR);
    execv(k->command[0], k->command);
    fprintf(stderr, "kvd-keeper: %s: %s\n", k->command[0], strerror(errno));
    _exit(EX_OSERR);
}

static void start(struct keeper *k)
{
    int pair[2];
    pid_t self = getpid();
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        die("socketpair");
    k->ready = false;
    k->kvd = fork();
    if (k->kvd < 0)
        die("fork");
    if (k->kvd == 0)
        run_kvd(k, pair[1], self);
    close(pair[1]);
    k->socket = pair[0];
    bool there = true;
    for (size_t i = 0; i < k->n && there; i++)
        there = kvd_keeper_send(k->socket, KVD_KEEPER_HELD, k->held[i].name, k->held[i].fd);
    if (there)
        kvd_keeper_send(k->socket, KVD_KEEPER_END, "", -1);
}

static void on_signal(struct keeper *k)
{
    struct signalfd_siginfo info;
    if (read(k->signal_fd, &info, sizeof(info)) != sizeof(info))
        return;
    int sig = (int)info.ssi_signo;
    if (sig == SIGCHLD) {
        int status;
        if (k->kvd && waitpid(k->kvd, &status, WNOHANG) == k->kvd) {
            k->kvd = 0;
            k->status = status;
        }
        return;
    }
    k->stopping |= sig != SIGHUP;
    if (k->kvd)
        kill(k->kvd, sig);
}

// Until kvd has ended, and all that it has said is read.
static void attend(struct keeper *k)
{
    while (k->kvd) {
        struct pollfd fds[] = {{.fd = k->signal_fd, .events = POLLIN},
                               {.fd = k->socket, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            die("poll");
        if (fds[0].revents & POLLIN)
            on_signal(k);
        if (fds[1].revents & POLLIN)
            while (receive(k))
                ;
        if (k->kvd && (fds[1].revents & POLLHUP)) { // it is about to end
            struct pollfd wait = fds[0];
            poll(&wait, 1, 1000);
            on_signal(k);
        }
    }
    while (receive(k))
        ;
    close(k->socket);
}

static void pause_for(struct keeper *k, int ms)
{
    struct pollfd fd = {.fd = k->signal_fd, .events = POLLIN};
    if (poll(&fd, 1, ms) > 0)
        on_signal(k);
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static int code_of(int status)
{
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static int end(struct keeper *k)
{
    free(k->held); // the descriptors go with the process
    return code_of(k->status);
}

int main(int argc, char **argv)
{
    struct keeper k = {.command = argv + 1};
    int delay = FIRST_DELAY_MS, soon = 0;
    bool ever = false;
    if (argc < 2) {
        fprintf(stderr, "usage: kvd-keeper KVD [ARGUMENT...]\n");
        return EX_USAGE;
    }
    raise_limit();
    sigemptyset(&k.signals);
    const int sigs[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP};
    for (size_t i = 0; i < sizeof(sigs) / sizeof(sigs[0]); i++)
        sigaddset(&k.signals, sigs[i]);
    sigprocmask(SIG_BLOCK, &k.signals, NULL);
    k.signal_fd = signalfd(-1, &k.signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (k.signal_fd < 0)
        die("signalfd");
    for (;;) {
        uint64_t began = now_ms();
        start(&k);
        attend(&k);
        ever |= k.ready;
        if (k.stopping || !ever)
            return end(&k);
        soon = now_ms() - began < SOON_MS ? soon + 1 : 0;
        bool at_once = k.ready && soon <= SOON_ENDS;
        fprintf(stderr,
                "kvd-keeper: kvd ended (%s %d); it is started again, and gets %zu descriptors\n",
                WIFEXITED(k.status) ? "code" : "signal",
                WIFEXITED(k.status) ? WEXITSTATUS(k.status) : WTERMSIG(k.status), k.n);
        if (!at_once)
            pause_for(&k, delay);
        delay = at_once ? FIRST_DELAY_MS : delay * 2 > LAST_DELAY_MS ? LAST_DELAY_MS : delay * 2;
        if (k.stopping)
            return end(&k);
    }
}

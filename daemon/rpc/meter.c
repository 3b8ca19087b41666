#include "daemon/rpc/meter.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "proto/base.h"

enum {
    METERS = 262144, // descriptor numbers
    CONTINUED_MAX = 8,
    PARTS = 16,     // of gRPC's memory that one read fills
    LARGE = 256,    // bytes from which on data cost more to send than to take in
    FEW_CALLS = 32, // a connection with no more is not ended for what others do
};

enum { DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION };
enum { ACK = 1, END_STREAM = 1, END_HEADERS = 4 };

// The process's, as recvmsg is: all that it is told is a descriptor.
static _Atomic(struct kvd_meter *) meters[METERS];
static _Atomic int64_t in_flight; // calls of all connections: the latest total and what came since
static _Atomic uint64_t most_in_flight;

void kvd_meter_start(struct kvd_meter *m, int fd, uint64_t most)
{
    atomic_store(&most_in_flight, most);
    kvd_turn_start(&m->turn, fd);
    if (fd < METERS)
        atomic_store(&meters[fd], m);
}

void kvd_meter_forget(int fd)
{
    if (fd >= 0 && fd < METERS)
        atomic_store(&meters[fd], NULL);
}

void kvd_meter_end_call(struct kvd_meter *m)
{
    atomic_fetch_sub(&m->in_flight, 1);
    atomic_fetch_sub(&in_flight, 1);
}

int64_t kvd_meter_calls(const struct kvd_meter *m)
{
    return KVD_MAX(atomic_load(&m->in_flight), (int64_t)0);
}

void kvd_meter_total(int64_t calls)
{
    atomic_store(&in_flight, calls);
}

static const char *count_call(struct kvd_meter *m)
{
    int64_t own = atomic_fetch_add(&m->in_flight, 1), all = atomic_fetch_add(&in_flight, 1);
    // A call that is reset and ended is counted down twice; that must not be saved up.
    if (own < 0)
        atomic_store(&m->in_flight, 1);
    if (own > 2 * KVD_LINK_CALLS)
        return "it has more calls in flight than HTTP/2 allows it";
    if (all > (int64_t)atomic_load(&most_in_flight) && own > FEW_CALLS)
        return "there are more than max-calls in flight, and it has many of them";
    return NULL;
}

static const char *count_idle(struct kvd_meter *m)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    uint64_t ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
    if (ns - m->window_ns > 1000000000) {
        m->window_ns = ns;
        m->idle = 0;
    }
    return ++m->idle > KVD_LINK_RESETS
               ? "it resets calls, or sends frames that carry nothing, without end"
               : NULL;
}

// A frame begins. Returns what is wrong with it, or NULL.
static const char *frame(struct kvd_meter *m)
{
    uint32_t len = (uint32_t)m->head[0] << 16 | (uint32_t)m->head[1] << 8 | m->head[2];
    uint8_t type = m->head[3], flags = m->head[4];
    m->skip = len;
    m->continued = type == CONTINUATION ? m->continued + 1 : 0;
    if (m->continued > CONTINUED_MAX)
        return "its headers have no end";
    if (type != HEADERS && type != RESET && (type != DATA || len < LARGE))
        kvd_turn_spend(&m->turn, KVD_TURN_FRAME);
    switch (type) {
    case HEADERS:
        kvd_turn_begin_call(&m->turn);
        return count_call(m);
    case RESET:
        kvd_turn_spend(&m->turn, KVD_TURN_CALL);
        kvd_meter_end_call(m);
        return count_idle(m);
    case PING:
    case SETTINGS:
        return flags & ACK ? NULL : count_idle(m);
    case DATA:
        return len || flags & END_STREAM ? NULL : count_idle(m);
    case CONTINUATION:
    case WINDOW:
    case GOAWAY:
        return NULL;
    default:
        return count_idle(m);
    }
}

// Returns how many of the bytes belong to the greeting.
static size_t greet(struct kvd_meter *m, const uint8_t *p, size_t n)
{
    static const char greeting[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    size_t step = KVD_MIN(n, sizeof(greeting) - 1 - m->greeted);
    m->foreign |= memcmp(p, greeting + m->greeted, step) != 0;
    m->greeted = (uint8_t)(m->greeted + step);
    return step;
}

static const char *feed(struct kvd_meter *m, const uint8_t *p, size_t n)
{
    const char *wrong = NULL;
    size_t greeting = greet(m, p, n);
    p += greeting;
    n -= m->foreign ? n : greeting;
    while (n && !wrong) {
        size_t step = m->skip ? KVD_MIN(n, (size_t)m->skip) : KVD_MIN(n, sizeof(m->head) - m->have);
        if (m->skip) {
            m->skip -= (uint32_t)step;
        } else {
            memcpy(m->head + m->have, p, step);
            m->have = (uint8_t)(m->have + step);
            if (m->have == sizeof(m->head)) {
                m->have = 0;
                wrong = frame(m);
            }
        }
        p += step;
        n -= step;
    }
    return wrong;
}

// Ends a connection. Returns what gRPC is told: that it hung up.
static ssize_t end(struct kvd_meter *m, int fd, const char *why)
{
    atomic_store(&m->verdict, why);
    shutdown(fd, SHUT_RDWR); // the loop hears of it by that
    return 0;
}

// What recvmsg would return, without taking it. *rights: descriptors would come along. gRPC has no
// room for any, so who takes them from the socket lets go of them, and waits as long as their
// sender likes. *msg becomes no longer than what there is, so that nothing that comes only now is
// read unseen.
static ssize_t look(int fd, struct msghdr *msg, int flags, bool *rights)
{
    struct msghdr seen = {.msg_iov = msg->msg_iov, .msg_iovlen = msg->msg_iovlen};
    ssize_t n = syscall(SYS_recvmsg, fd, &seen, flags | MSG_PEEK);
    *rights = n > 0 && seen.msg_flags & MSG_CTRUNC;
    size_t left = n > 0 ? (size_t)n : 0;
    for (size_t i = 0; i < msg->msg_iovlen && n > 0; i++) {
        msg->msg_iov[i].iov_len = KVD_MIN(msg->msg_iov[i].iov_len, left);
        left -= msg->msg_iov[i].iov_len;
    }
    return n;
}

// Reads what the connection's turn allows: the rest of a frame that has begun, and some bytes more.
static ssize_t receive(struct kvd_meter *m, int fd, struct msghdr *msg, int flags)
{
    struct iovec parts[PARTS];
    struct msghdr some = *msg;
    size_t most = m->skip + kvd_turn_bytes(&m->turn);
    some.msg_iov = parts;
    some.msg_iovlen = 0;
    for (size_t i = 0; i < KVD_MIN(msg->msg_iovlen, (size_t)PARTS) && most; i++) {
        parts[i] = msg->msg_iov[i];
        parts[i].iov_len = KVD_MIN(parts[i].iov_len, most);
        most -= parts[i].iov_len;
        some.msg_iovlen++;
    }
    bool rights = false;
    ssize_t n = m->rights ? look(fd, &some, flags, &rights) : 1;
    if (rights)
        n = end(m, fd, "it sends descriptors, which nobody asked for");
    else if (n > 0)
        n = syscall(SYS_recvmsg, fd, &some, flags);
    msg->msg_controllen = some.msg_controllen;
    msg->msg_flags = some.msg_flags;
    return n;
}

// gRPC reads with this: the linker puts the program's symbols before libc's.
__attribute__((visibility("default"))) ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
    struct kvd_meter *m = fd >= 0 && fd < METERS ? atomic_load(&meters[fd]) : NULL;
    if (!m || flags & MSG_PEEK)
        return syscall(SYS_recvmsg, fd, msg, flags);
    if (atomic_load(&m->verdict))
        return 0;
    if (!kvd_turn_may_read(&m->turn)) {
        errno = EAGAIN;
        return -1;
    }
    ssize_t n = receive(m, fd, msg, flags);
    if (n <= 0)
        return n;
    const char *wrong = NULL;
    size_t left = (size_t)n;
    for (size_t i = 0; i < msg->msg_iovlen && left && !wrong; i++) {
        size_t part = KVD_MIN(left, msg->msg_iov[i].iov_len);
        wrong = feed(m, msg->msg_iov[i].iov_base, part);
        left -= part;
    }
    if (!wrong)
        return n;
    return end(m, fd, wrong);
}

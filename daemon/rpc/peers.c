#include "daemon/rpc/peers.h"

#include <arpa/inet.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <uthash.h>

#include "daemon/core/log.h"

enum { NUMBERS = 262144 }; // of descriptors

struct kvd_peer_address {
    struct in6_addr key; // IPv4 as in IPv6
    uint64_t connections, calls;
    UT_hash_handle hh;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct kvd_peer_address *addresses;             // under the lock
static uint64_t connections;                           // of all; under the lock
static uint64_t most_connections, most_calls;          // under the lock
static time_t warned;                                  // under the lock
static _Atomic(struct kvd_peer_address *) of[NUMBERS]; // by descriptor

void kvd_peers_limit(uint64_t max_connections, uint64_t max_calls)
{
    pthread_mutex_lock(&lock);
    most_connections = max_connections;
    most_calls = max_calls;
    pthread_mutex_unlock(&lock);
}

// IPv4 addresses take the place that IPv6 has for them; of IPv6, a network of 64 bits is one.
static struct in6_addr key_of(int family, const void *address)
{
    struct in6_addr key = {0};
    static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
    if (family == AF_INET) {
        memcpy(key.s6_addr, mapped, 12);
        memcpy(key.s6_addr + 12, address, 4);
    } else if (memcmp(address, mapped, 12) == 0) {
        memcpy(key.s6_addr, address, 16);
    } else {
        memcpy(key.s6_addr, address, 8);
    }
    return key;
}

// To be called under the lock. NULL when memory is short.
static struct kvd_peer_address *find(struct in6_addr key)
{
    struct kvd_peer_address *a;
    HASH_FIND(hh, addresses, &key, sizeof(key), a);
    if (a)
        return a;
    a = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    a->key = key;
    HASH_ADD(hh, addresses, key, sizeof(a->key), a);
    return a;
}

static void drop_unused(struct kvd_peer_address *a)
{
    if (!a || a->connections || a->calls)
        return;
    HASH_DEL(addresses, a);
    free(a);
}

// Once a second, as many may come.
static void warn(const struct kvd_peer_address *a)
{
    char text[INET6_ADDRSTRLEN] = "?";
    if (time(NULL) == warned)
        return;
    warned = time(NULL);
    inet_ntop(AF_INET6, &a->key, text, sizeof(text));
    kvd_warning(
        "connections over TLS are hung up on: %s has %llu, all have %llu; one may have half "
        "of %llu, three quarters of max-connections",
        text, (unsigned long long)a->connections, (unsigned long long)connections,
        (unsigned long long)most_connections);
}

bool kvd_peers_add(int fd)
{
    struct sockaddr_storage s = {0};
    socklen_t len = sizeof(s);
    if (fd >= NUMBERS || getpeername(fd, (struct sockaddr *)&s, &len))
        return false;
    if (s.ss_family != AF_INET && s.ss_family != AF_INET6)
        return true;
    struct in6_addr key = s.ss_family == AF_INET
                              ? key_of(AF_INET, &((struct sockaddr_in *)&s)->sin_addr)
                              : key_of(AF_INET6, &((struct sockaddr_in6 *)&s)->sin6_addr);
    pthread_mutex_lock(&lock);
    struct kvd_peer_address *a = find(key);
    bool fits = a && connections < most_connections && a->connections < most_connections / 2;
    if (fits) {
        a->connections++;
        connections++;
        atomic_store(&of[fd], a);
    } else if (a) {
        warn(a);
        drop_unused(a);
    }
    pthread_mutex_unlock(&lock);
    return fits;
}

// gRPC ends a connection with this: the linker puts the program's symbols before libc's.
__attribute__((visibility("default"))) int close(int fd)
{
    struct kvd_peer_address *a =
        fd >= 0 && fd < NUMBERS && atomic_load(&of[fd]) ? atomic_exchange(&of[fd], NULL) : NULL;
    if (a) {
        pthread_mutex_lock(&lock);
        a->connections--;
        connections--;
        drop_unused(a);
        pthread_mutex_unlock(&lock);
    }
    return (int)syscall(SYS_close, fd);
}

// "ipv4:10.0.0.1:1234", "ipv6:%5B::1%5D:1234" (newer ones have the brackets as they are).
static bool parse(const char *peer, struct in6_addr *key)
{
    char text[INET6_ADDRSTRLEN];
    struct in6_addr address;
    bool six = strncmp(peer, "ipv6:", 5) == 0;
    if (!six && strncmp(peer, "ipv4:", 5) != 0)
        return false;
    const char *begin = peer + 5;
    if (six)
        begin += strncmp(begin, "%5B", 3) == 0 ? 3 : *begin == '[';
    size_t n = six ? strcspn(begin, "%]") : strcspn(begin, ":");
    if (n >= sizeof(text))
        return false;
    memcpy(text, begin, n);
    text[n] = '\0';
    if (inet_pton(six ? AF_INET6 : AF_INET, text, &address) != 1)
        return false;
    *key = key_of(six ? AF_INET6 : AF_INET, &address);
    return true;
}

int kvd_peers_begin_call(const char *peer, struct kvd_peer_address **out, struct kvd_error *err)
{
    struct in6_addr key;
    *out = NULL;
    if (!peer || !parse(peer, &key))
        return KVD_OK;
    int rc = KVD_OK;
    pthread_mutex_lock(&lock);
    struct kvd_peer_address *a = find(key);
    if (!a)
        rc = kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    else if (a->calls >= most_calls / 2)
        rc = kvd_fail(err, KVD_E_LIMIT,
                      "your address has %llu calls in flight, and one may have half of what those "
                      "who come over TCP may have; wait for some or raise max-calls",
                      (unsigned long long)a->calls);
    if (rc == KVD_OK) {
        a->calls++;
        *out = a;
    } else {
        drop_unused(a);
    }
    pthread_mutex_unlock(&lock);
    return rc;
}

void kvd_peers_end_call(struct kvd_peer_address **address)
{
    struct kvd_peer_address *a = KVD_TAKE(*address);
    if (!a)
        return;
    pthread_mutex_lock(&lock);
    a->calls--;
    drop_unused(a);
    pthread_mutex_unlock(&lock);
}

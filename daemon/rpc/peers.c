#include "daemon/rpc/peers.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <uthash.h>

#include "daemon/rpc/users.h"

struct kvd_peers {
    struct kvd_daemon *d;
    struct kvd_peer_address *by_key;
    uint64_t connections;
    uint32_t refs; // one is the owner's, one each address's
};

struct kvd_peer_address {
    struct kvd_peers *all;
    struct in6_addr key; // IPv4 as in IPv6
    char text[INET6_ADDRSTRLEN];
    uint32_t refs;
    uint64_t connections, calls;
    UT_hash_handle hh;
};

struct kvd_peers *kvd_peers_new(struct kvd_daemon *d)
{
    struct kvd_peers *all = calloc(1, sizeof(*all));
    if (all)
        *all = (struct kvd_peers){.d = d, .refs = 1};
    return all;
}

void kvd_peers_drop(struct kvd_peers **peers)
{
    struct kvd_peers *all = KVD_TAKE(*peers);
    if (all && --all->refs == 0)
        free(all);
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

static struct kvd_peer_address *address_new(struct kvd_peers *all, struct in6_addr key)
{
    struct kvd_peer_address *a = calloc(1, sizeof(*a));
    if (!a)
        return NULL;
    a->all = all;
    all->refs++;
    a->key = key;
    if (IN6_IS_ADDR_V4MAPPED(&key))
        inet_ntop(AF_INET, key.s6_addr + 12, a->text, sizeof(a->text));
    else
        inet_ntop(AF_INET6, &key, a->text, sizeof(a->text));
    HASH_ADD(hh, all->by_key, key, sizeof(a->key), a);
    return a;
}

struct kvd_peer_address *kvd_peer_ref_of(struct kvd_peers *all, int fd)
{
    struct sockaddr_storage s = {0};
    socklen_t len = sizeof(s);
    struct kvd_peer_address *a = NULL;
    if (getpeername(fd, (struct sockaddr *)&s, &len) ||
        (s.ss_family != AF_INET && s.ss_family != AF_INET6))
        return NULL;
    struct in6_addr key = s.ss_family == AF_INET
                              ? key_of(AF_INET, &((struct sockaddr_in *)&s)->sin_addr)
                              : key_of(AF_INET6, &((struct sockaddr_in6 *)&s)->sin6_addr);
    HASH_FIND(hh, all->by_key, &key, sizeof(key), a);
    if (!a)
        a = address_new(all, key);
    return a ? kvd_peer_ref(a) : NULL;
}

struct kvd_peer_address *kvd_peer_ref(struct kvd_peer_address *a)
{
    a->refs++;
    return a;
}

void kvd_peer_unref(struct kvd_peer_address **address)
{
    struct kvd_peer_address *a = KVD_TAKE(*address);
    if (!a || --a->refs)
        return;
    struct kvd_peers *all = a->all;
    HASH_DEL(all->by_key, a);
    free(a);
    kvd_peers_drop(&all);
}

const char *kvd_peer_text(const struct kvd_peer_address *a)
{
    return a->text;
}

static uint64_t most(const struct kvd_peer_address *a, enum kvd_share share)
{
    return kvd_share_total(a->all->d, share) / 4 * 3;
}

int kvd_peer_take(struct kvd_peer_address *a, struct kvd_error *err)
{
    uint64_t all = most(a, KVD_SHARE_CONNECTIONS);
    if (a->all->connections >= all || a->connections >= all / 2)
        return kvd_fail(err, KVD_E_LIMIT,
                        "%s has %" PRIu64 " connections over TLS, all have %" PRIu64
                        "; one may have half of %" PRIu64 ", three quarters of max-connections",
                        a->text, a->connections, a->all->connections, all);
    a->connections++;
    a->all->connections++;
    return KVD_OK;
}

void kvd_peer_give(struct kvd_peer_address *a)
{
    a->connections--;
    a->all->connections--;
}

int kvd_peer_begin_call(struct kvd_peer_address *a, struct kvd_error *err)
{
    if (!a)
        return KVD_OK;
    if (a->calls >= most(a, KVD_SHARE_CALLS) / 2)
        return kvd_fail(err, KVD_E_LIMIT,
                        "your address has %" PRIu64
                        " calls in flight, and one may have half of what those who come over TCP "
                        "may have; wait for some or raise max-calls",
                        a->calls);
    a->calls++;
    return KVD_OK;
}

void kvd_peer_end_call(struct kvd_peer_address *a)
{
    if (a)
        a->calls--;
}

#include "daemon/rpc/users.h"

#include <uthash.h>

#include "daemon/core/daemon.h"

struct kvd_user {
    struct kvd_users *all;
    int64_t uid;
    uint32_t refs;
    uint64_t used[KVD_SHARE_COUNT];
    UT_hash_handle hh;
};

struct kvd_users {
    struct kvd_user *by_uid;
    const struct kvd_config *config;
    uint64_t possible[KVD_SHARE_COUNT], used[KVD_SHARE_COUNT]; // possible: 0 where only the
                                                               // configuration sets a bound
};

static const struct {
    const char *label; // in the metrics
    const char *what;  // is counted
    const char *key;   // of the configuration that bounds it, if any
} shares[KVD_SHARE_COUNT] = {
    [KVD_SHARE_CONNECTIONS] = {"connections", "connections", "max-connections"},
    [KVD_SHARE_CALLS] = {"calls", "calls in flight", "max-calls"},
    [KVD_SHARE_REPLY_BYTES] = {"reply_bytes", "bytes of replies that are made or unread",
                               "max-reply-bytes"},
    [KVD_SHARE_MAPPINGS] = {"mappings", "registered buffers and segments", "vm.max_map_count"},
    [KVD_SHARE_DESCRIPTORS] = {"descriptors",
                               "descriptors sent and not asked for, or not closed yet",
                               "max-connections"},
    [KVD_SHARE_BUFFER_BYTES] = {"buffer_bytes", "bytes of registered buffers",
                                "max-buffer-bytes-total"},
    [KVD_SHARE_SEGMENT_BYTES] = {"segment_bytes", "bytes of registered segments of GPU memory",
                                 NULL},
    [KVD_SHARE_SESSIONS] = {"sessions", "sessions", "max-sessions"},
    [KVD_SHARE_SEQUENCES] = {"sequences", "sequences held by sessions", "max-sequences"},
    [KVD_SHARE_NAMESPACES] = {"namespaces", "namespaces", NULL},
    [KVD_SHARE_LAYOUTS] = {"layouts", "layouts", NULL},
    [KVD_SHARE_LEASES] = {"leases", "leases of prefixes", NULL},
};

static struct kvd_users *users(struct kvd_daemon *d)
{
    if (!d->users)
        d->users = calloc(1, sizeof(*d->users));
    if (d->users)
        d->users->config = &d->config;
    return d->users;
}

static uint64_t total_of(const struct kvd_users *all, enum kvd_share share)
{
    const struct kvd_config *c = all->config;
    const uint64_t configured[KVD_SHARE_COUNT] = {
        [KVD_SHARE_CONNECTIONS] = c->max_connections,
        [KVD_SHARE_CALLS] = c->max_calls,
        [KVD_SHARE_REPLY_BYTES] = c->max_reply_bytes,
        [KVD_SHARE_MAPPINGS] = UINT64_MAX,
        [KVD_SHARE_DESCRIPTORS] = c->max_connections,
        [KVD_SHARE_BUFFER_BYTES] =
            c->max_buffer_bytes_total ? c->max_buffer_bytes_total : UINT64_MAX,
        [KVD_SHARE_SEGMENT_BYTES] = UINT64_MAX,
        [KVD_SHARE_SESSIONS] = c->max_sessions,
        [KVD_SHARE_SEQUENCES] = c->max_sequences,
        [KVD_SHARE_NAMESPACES] = KVD_MAX_NAMESPACES,
        [KVD_SHARE_LAYOUTS] = KVD_MAX_LAYOUTS,
        [KVD_SHARE_LEASES] = KVD_MAX_LEASES,
    };
    return all->possible[share] ? KVD_MIN(all->possible[share], configured[share])
                                : configured[share];
}

void kvd_share_possible(struct kvd_daemon *d, enum kvd_share share, uint64_t possible)
{
    if (users(d))
        d->users->possible[share] = possible;
}

uint64_t kvd_share_total(const struct kvd_daemon *d, enum kvd_share share)
{
    return d->users ? total_of(d->users, share) : 0;
}

uint64_t kvd_share_used(const struct kvd_daemon *d, enum kvd_share share)
{
    return d->users ? d->users->used[share] : 0;
}

struct kvd_user *kvd_user_ref(struct kvd_daemon *d, int64_t uid)
{
    struct kvd_users *all = users(d);
    struct kvd_user *u = NULL;
    if (!all)
        return NULL;
    HASH_FIND(hh, all->by_uid, &uid, sizeof(uid), u);
    if (!u) {
        u = calloc(1, sizeof(*u));
        if (!u)
            return NULL;
        u->all = all;
        u->uid = uid;
        HASH_ADD(hh, all->by_uid, uid, sizeof(u->uid), u);
    }
    u->refs++;
    return u;
}

int64_t kvd_user_uid(const struct kvd_user *user)
{
    return user->uid;
}

void kvd_user_unref(struct kvd_user **user)
{
    struct kvd_user *u = KVD_TAKE(*user);
    if (!u || --u->refs)
        return;
    HASH_DEL(u->all->by_uid, u);
    free(u);
}

static int over(const struct kvd_user *u, enum kvd_share share, uint64_t n, bool alone,
                struct kvd_error *err)
{
    uint64_t total = total_of(u->all, share), used = alone ? u->used[share] : u->all->used[share];
    uint64_t wanted = used + n, most = alone ? total / 4 * 3 : total;
    char who[48] = "all users together";
    if (alone && u->uid == KVD_USER_UNKNOWN)
        snprintf(who, sizeof(who), "those who come over TCP");
    else if (alone)
        snprintf(who, sizeof(who), "user %" PRId64, u->uid);
    return kvd_fail(err, KVD_E_LIMIT,
                    "%s would have %" PRIu64 " %s, %" PRIu64 " are possible; give some back%s%s",
                    who, wanted, shares[share].what, most, shares[share].key ? " or raise " : "",
                    shares[share].key ? shares[share].key : "");
}

int kvd_user_take(struct kvd_user *user, enum kvd_share share, uint64_t n, struct kvd_error *err)
{
    struct kvd_users *all = user->all;
    uint64_t total = total_of(all, share);
    if (n > total || user->used[share] > total / 4 * 3 || n > total / 4 * 3 - user->used[share])
        return over(user, share, n, true, err);
    if (all->used[share] > total || n > total - all->used[share])
        return over(user, share, n, false, err);
    user->used[share] += n;
    all->used[share] += n;
    return KVD_OK;
}

void kvd_user_give(struct kvd_user *user, enum kvd_share share, uint64_t n)
{
    user->used[share] -= n;
    user->all->used[share] -= n;
}

static void deinit(struct kvd_daemon *d)
{
    struct kvd_users *all = KVD_TAKE(d->users);
    struct kvd_user *u, *next;
    if (!all)
        return;
    HASH_ITER(hh, all->by_uid, u, next)
    {
        kvd_error("a user still has shares at the end: a leak uid=%" PRId64 " refs=%u", u->uid,
                  u->refs);
        HASH_DEL(all->by_uid, u);
        free(u);
    }
    free(all);
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric_head(f, "kvd_share_limit", "gauge",
                    "What clients may have of it in all; one user may have three quarters.");
    for (int i = 0; i < KVD_SHARE_COUNT; i++)
        fprintf(f, "kvd_share_limit{share=\"%s\"} %" PRIu64 "\n", shares[i].label,
                kvd_share_total(d, (enum kvd_share)i));
    kvd_metric_head(f, "kvd_share_used", "gauge", "What they have.");
    for (int i = 0; i < KVD_SHARE_COUNT; i++)
        fprintf(f, "kvd_share_used{share=\"%s\"} %" PRIu64 "\n", shares[i].label,
                kvd_share_used(d, (enum kvd_share)i));
}

const struct kvd_part kvd_part_users = {.deinit = deinit, .metrics = metrics};

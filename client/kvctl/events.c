// kvctl events: a stream of a namespace's events, a line each.
#include <errno.h>

#include "client/kvctl/kvctl.h"
#include "kvd.pb-c.h"
#include "proto/base.h"
#include "proto/kvd_limits.h"

enum { FOREVER_MS = 3600000 };

static void print_key(const uint8_t *key)
{
    for (size_t i = 0; i < KVD_BLOCK_KEY; i++)
        printf("%02x", key[i]);
}

static void print_event(const Kvd__V1__Event *e)
{
    static const char *const kinds[] = {"opened", "evicted", "draining", "lost", "published",
                                        "stored", "removed", "cleared",  "moved"};
    // As kvctl why says it.
    static const char *const reasons[] = {
        [KVD__V1__MISS_REASON__MISS_EVICTED_ROOM] = "evicted for room",
        [KVD__V1__MISS_REASON__MISS_EVICTED_QUOTA] = "evicted for the quota",
        [KVD__V1__MISS_REASON__MISS_EVICTED_INDEX] = "evicted for the index",
        [KVD__V1__MISS_REASON__MISS_DROPPED] = "dropped",
        [KVD__V1__MISS_REASON__MISS_DAMAGED] = "damaged",
        [KVD__V1__MISS_REASON__MISS_EVICTED_ASKED] = "evicted by an operator",
        [KVD__V1__MISS_REASON__MISS_EXPIRED] = "expired",
        [KVD__V1__MISS_REASON__MISS_SUPERSEDED] = "superseded",
    };
    const size_t keys = e->keys.len / KVD_BLOCK_KEY;
    char text[KVCTL_TEXT];
    printf("%llu  %s", (unsigned long long)e->number,
           (size_t)e->kind < KVD_LEN(kinds) ? kinds[e->kind] : "unknown to this kvctl");
    if (e->name[0])
        printf("  %s", kvctl_text(e->name, text));
    if (e->kind == KVD__V1__EVENT__KIND__LOST)
        printf(e->count ? "  %llu events" : "  an unknown number of events",
               (unsigned long long)e->count);
    if (e->tier[0])
        printf("  %s", kvctl_text(e->tier, text));
    if (keys) {
        printf("  %zu blocks of %u tokens, to ", keys, e->tokens);
        print_key(e->keys.data + (keys - 1) * KVD_BLOCK_KEY);
    }
    if (e->parent.len == KVD_BLOCK_KEY) {
        printf(" behind ");
        print_key(e->parent.data);
    }
    if (e->kind == KVD__V1__EVENT__KIND__BLOCKS_REMOVED) {
        const char *why = (size_t)e->miss < KVD_LEN(reasons) ? reasons[e->miss] : NULL;
        printf(" (%s)", why ? why : "for a reason that is unknown to this kvctl");
    }
    printf("\n");
}

static int show(const struct kvctl *k, const Kvd__V1__Event *e)
{
    if (k->json) {
        json_t *j = kvctl_to_json(&e->base);
        json_dumpf(j, stdout, JSON_COMPACT);
        printf("\n");
        json_decref(j);
    } else {
        print_event(e);
    }
    return fflush(stdout) ? EXIT_FAILED : EXIT_OK;
}

static int follow(struct kvctl *k, struct kvd_stream *stream, uint64_t left)
{
    struct kvd_error err = {0};
    int code = EXIT_OK;
    while (left && code == EXIT_OK) {
        Kvd__V1__Event *e = NULL;
        int rc = kvd_stream_next(stream, &kvd__v1__event__descriptor, FOREVER_MS, &e, &err);
        if (rc == KVD_E_TIMEOUT)
            continue;
        if (err.code == KVD_E_UNAVAILABLE && !kvd_channel_connected(k->channel))
            kvctl_no_answer(k, &err);
        if (rc)
            return kvctl_fail(&err);
        code = show(k, e);
        kvd__v1__event__free_unpacked(e, NULL);
        left--;
    }
    return code;
}

int cmd_events(struct kvctl *k)
{
    Kvd__V1__WatchNamespaceRequest req = KVD__V1__WATCH_NAMESPACE_REQUEST__INIT;
    const char *after = kvctl_option(k, "after"), *count = kvctl_option(k, "count");
    struct kvd_error err = {0};
    char *end = NULL;
    req.namespace_name = (char *)k->arguments[0];
    errno = 0;
    if (after)
        req.after = strtoull(after, &end, 10);
    if (after && (errno || end == after || *end || *after == '-'))
        return kvctl_usage("'%s' is no number of an event", after);
    int code = kvctl_as_operator(k);
    struct kvd_channel *c = code ? NULL : kvctl_channel(k, &err);
    if (code)
        return code;
    struct kvd_stream *stream =
        c ? kvd_stream_open(c, "/kvd.v1.KvCache/WatchNamespace", &req, &err) : NULL;
    if (!stream)
        return kvctl_fail(&err);
    code = follow(k, stream, count ? strtoull(count, NULL, 10) : UINT64_MAX);
    kvd_stream_free(&stream);
    return code;
}

// Who is charged for namespaces and layouts. They outlast the session that made them, so charges
// end when the next one is wanted, or a session ends.
#include "daemon/session/tenants.h"

#include "daemon/core/daemon.h"
#include "daemon/rpc/users.h"

static void discharge(struct kvd_user **user, enum kvd_share share)
{
    if (*user)
        kvd_user_give(*user, share, 1);
    kvd_user_unref(user);
}

// Those that are gone are no longer charged.
static void discharge_gone(struct kvd_daemon *d)
{
    struct kvd_pool_namespace_info info;
    for (uint32_t i = 0; i < kvd_pool_namespace_count(d->pool); i++) {
        kvd_pool_namespace_info(d->pool, i, &info);
        if (!info.name[0])
            discharge(&d->namespace_users[i], KVD_SHARE_NAMESPACES);
    }
    for (uint32_t i = 0; i < KVD_MAX_LAYOUTS; i++)
        if (d->layout_users[i] && kvd_pool_layout_refs(d->pool, i) == 0)
            discharge(&d->layout_users[i], KVD_SHARE_LAYOUTS);
}

// What a user left behind: the namespace, or layout, that is longest out of use. False: nothing.
static bool left_behind(const struct kvd_daemon *d, const struct kvd_user *user,
                        enum kvd_share share, struct kvd_pool_clearing *c)
{
    bool spaces = share == KVD_SHARE_NAMESPACES;
    uint32_t n = spaces ? kvd_pool_namespace_count(d->pool) : KVD_MAX_LAYOUTS;
    uint64_t used, oldest = UINT64_MAX;
    for (uint32_t i = 0; i < n; i++) {
        if ((spaces ? d->namespace_users[i] : d->layout_users[i]) != user)
            continue;
        if ((spaces ? kvd_pool_namespace_idle(d->pool, i, &used)
                    : kvd_pool_layout_idle(d->pool, i, &used)) &&
            used < oldest) {
            *c = (struct kvd_pool_clearing){.layout = !spaces, .index = i};
            oldest = used;
        }
    }
    return oldest != UINT64_MAX;
}

static bool make_room(struct kvd_daemon *d, const struct kvd_user *user, enum kvd_share share)
{
    struct kvd_pool_clearing c;
    if (!left_behind(d, user, share, &c))
        return false;
    kvd_pool_clear(d->pool, &c, UINT32_MAX);
    discharge_gone(d);
    return true;
}

// Whether a user could be charged for one more only after some clearing.
static bool would_clear(const struct kvd_daemon *d, struct kvd_user *user, enum kvd_share share,
                        struct kvd_pool_clearing *c)
{
    struct kvd_error full = {0};
    if (kvd_user_take(user, share, 1, &full) == KVD_OK) {
        kvd_user_give(user, share, 1);
        return false;
    }
    return left_behind(d, user, share, c);
}

// A reference to a user who has been charged for one more.
static struct kvd_user *charge(struct kvd_daemon *d, int64_t uid, enum kvd_share share,
                               struct kvd_error *err)
{
    struct kvd_user *u = kvd_user_ref(d, uid);
    if (!u)
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    else if (kvd_user_take(u, share, 1, err) &&
             (!make_room(d, u, share) || kvd_user_take(u, share, 1, err)))
        kvd_user_unref(&u);
    return u;
}

bool kvd_tenants_clear(struct kvd_daemon *d, int64_t uid, const char *name,
                       const struct kvd_layout *g, struct kvd_pool_clearing *c)
{
    uint32_t ns = kvd_pool_namespace_find(d->pool, name), known = kvd_pool_layout_find(d->pool, g);
    struct kvd_user *user = kvd_user_ref(d, uid);
    bool any = false;
    discharge_gone(d);
    if (user && ns == KVD_POOL_NONE)
        any = would_clear(d, user, KVD_SHARE_NAMESPACES, c) ||
              kvd_pool_namespace_clears(d->pool, 1, c);
    if (user && !any && (known == KVD_POOL_NONE || !kvd_pool_layout_refs(d->pool, known)))
        any = would_clear(d, user, KVD_SHARE_LAYOUTS, c) || kvd_pool_layout_clears(d->pool, ns, c);
    kvd_user_unref(&user);
    return any;
}

int kvd_namespace_listed(const struct kvd_daemon *d, const char *name, struct kvd_error *err)
{
    if (!d->config.only_listed_namespaces || kvd_config_namespace_find(&d->config, name))
        return KVD_OK;
    return kvd_fail(err, KVD_E_DENIED,
                    "there is no namespace %s: kvd's configuration has only-listed-namespaces and "
                    "no [namespace %s]",
                    name, name);
}

int kvd_namespace_open(struct kvd_daemon *d, int64_t uid, const char *name, uint32_t *ns,
                       struct kvd_error *err)
{
    int rc = kvd_namespace_listed(d, name, err);
    if (rc)
        return rc;
    discharge_gone(d);
    if (kvd_pool_namespace_find(d->pool, name) != KVD_POOL_NONE)
        return kvd_pool_namespace(d->pool, name, ns, err);
    struct kvd_user *user = charge(d, uid, KVD_SHARE_NAMESPACES, err);
    if (!user)
        return err->code;
    rc = kvd_pool_namespace(d->pool, name, ns, err);
    if (rc) {
        discharge(&user, KVD_SHARE_NAMESPACES);
        return rc;
    }
    discharge(&d->namespace_users[*ns], KVD_SHARE_NAMESPACES); // of one that made room for it
    d->namespace_users[*ns] = user;
    return KVD_OK;
}

void kvd_namespace_close(struct kvd_daemon *d, uint32_t ns)
{
    kvd_pool_namespace_release(d->pool, ns);
    discharge_gone(d);
}

int kvd_layout_open(struct kvd_daemon *d, int64_t uid, uint32_t ns, const struct kvd_layout *g,
                    const uint64_t (*page_bytes)[KVD_POOL_KINDS], uint32_t *layout, bool *recycled,
                    struct kvd_error *err)
{
    discharge_gone(d);
    uint32_t known = kvd_pool_layout_find(d->pool, g);
    bool live = known != KVD_POOL_NONE && kvd_pool_layout_refs(d->pool, known);
    struct kvd_user *user = live ? NULL : charge(d, uid, KVD_SHARE_LAYOUTS, err);
    if (!live && !user)
        return err->code;
    int rc = kvd_pool_layout(d->pool, ns, g, page_bytes, layout, recycled, err);
    if (rc) {
        discharge(&user, KVD_SHARE_LAYOUTS);
        return rc;
    }
    if (user) {
        discharge(&d->layout_users[*layout], KVD_SHARE_LAYOUTS);
        d->layout_users[*layout] = user;
    }
    return KVD_OK;
}

static void deinit(struct kvd_daemon *d)
{
    for (uint32_t i = 0; i < KVD_MAX_NAMESPACES; i++)
        discharge(&d->namespace_users[i], KVD_SHARE_NAMESPACES);
    for (uint32_t i = 0; i < KVD_MAX_LAYOUTS; i++)
        discharge(&d->layout_users[i], KVD_SHARE_LAYOUTS);
}

const struct kvd_part kvd_part_tenants = {.deinit = deinit};

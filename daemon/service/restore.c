// Promotion.
//
//   waits → looks (which of the blocks that the pool lacks are in which tier, up to the first that
//   is nowhere) → plans (how far a sequence could be made) → fetches → done
//
// Fetching is a window of blocks that goes over the prompt: blocks are got from the tiers in
// whatever order they come, verified there, and enter the index in the prompt's order, as each
// comes behind the one before it. The executor copies them into new pages, in the session's
// namespace's turn, one after the other as they come (sched/upload.h). Pages go the same way, but
// what does not come of them is left out, as none needs those before it. Of several that lack the
// same block one fetches, and the others wait for it and look again. A namespace has at most its
// part of those that run.
#include "daemon/service/restore.h"

#include <utlist.h>

#include "daemon/core/lifecycle.h"
#include "daemon/sched/upload.h"
#include "daemon/session/room.h"
#include "daemon/service/layout.h"
#include "daemon/service/restore_counts.h"

enum {
    WEIGHT = KVD_RESTORE_PARTS, // of one; a part has less
    MOST_RUNNING = 32 * WEIGHT,
    MOST_OF_NAMESPACE = 8 * WEIGHT,
    LOOKED = 256,            // keys at a time
    FLYING_BYTES = 64 << 20, // of one restore
    FLYING_LEAST = 1 << 20,  // that it may have whatever others have, by weight
    FLYING_OF_ALL = 256 << 20,
    TICK_MS = 20,
    PIECE_NS = 1000000,
};

enum state {
    WAITS, // for others to be done
    LOOKS,
    PLANS,
    FOLLOWS, // another that fetches the same
    FETCHES,
    DONE,
};

// A block on its way.
struct slot {
    struct kvd_block *got[KVD_MAX_PLANES];
    uint8_t planes;              // that are wanted
    uint8_t tier;                // the farthest that gave some
    uint32_t left;               // gets under way
    struct kvd_blocks_load load; // its pages
};

struct kvd_restore {
    struct kvd_daemon *d;
    struct kvd_restore_ask ask;
    kvd_restore_done *done;
    void *ctx;
    struct kvd_restore_answer answer;
    enum state state;
    bool asked;                              // tiers: LOOKS waits for them
    bool ended;                              // by its owner; it goes when `users` is 0
    bool holds;                              // what comes, until kvd_restore_go
    uint32_t users;                          // what will call back
    uint64_t until_ms, begun_ns, fetched_ns; // began to look, and to fetch
    const struct kvd_layout *layout;
    uint8_t digest[32]; // of it
    uint32_t planes;
    // By block: planes that the pool has. By block and plane: 1 + the nearest tier that has it.
    uint8_t *have, *where;
    struct kvd_tier_key *keys;
    uint32_t known;  // leading blocks in the index
    uint32_t looked; // blocks
    struct slot *slots;
    uint32_t front, next, to; // blocks: not back yet, not asked for yet, as far as it will go
    // Blocks: not given to the upload yet, and not come from there yet. Behind one that is not good
    // `front` stays, and those that come are put down.
    uint32_t sent, come;
    uint32_t uploaded;       // pieces of the upload that have come
    uint64_t flying;         // bytes
    struct kvd_blocks_at at; // behind which the next one comes
    uint32_t *held, n_held;  // of pages: entries of those that are back
    struct kvd_upload *upload;
    struct kvd_room room; // for the next one to be sent
    struct kvd_fair_flow flow;
    struct kvd_restore *prev, *next_one;
};

struct kvd_restores {
    uv_idle_t idle;          // runs while some have something to do at once
    uv_timer_t timer;        // runs while there are some
    struct kvd_restore *all; // in the order of their arrival
    uint32_t running, of_namespace[KVD_MAX_NAMESPACES]; // their weights
    uint64_t flying;                                    // bytes
    struct kvd_restore_counts counts;
};

static void on_idle(uv_idle_t *idle);
static void take_in_all(struct kvd_restore *r);

static void wake(struct kvd_daemon *d)
{
    uv_idle_start(&d->restores->idle, on_idle);
}

// -- its end ------------------------------------------------------------------------------------

static uint32_t weight(const struct kvd_restore *r)
{
    return r->ask.parts ? WEIGHT / r->ask.parts : WEIGHT;
}

static bool runs(const struct kvd_restore *r)
{
    return r->state != WAITS && r->state != DONE;
}

static void fly(struct kvd_restore *r, int64_t bytes)
{
    r->flying += (uint64_t)bytes;
    r->d->restores->flying += (uint64_t)bytes;
}

static void let_go(struct kvd_restore *r)
{
    struct kvd_daemon *d = r->d;
    fly(r, -(int64_t)r->flying);
    for (uint32_t i = 0; r->slots && i < r->ask.n; i++)
        for (uint32_t p = 0; p < r->planes; p++)
            kvd_block_unref(&r->slots[i].got[p]);
    if (r->at.blocks)
        kvd_blocks_release(d->pool, &r->at);
    if (r->n_held)
        kvd_blocks_release_pages(d->pool, r->ask.space.ns, r->held, r->n_held);
    kvd_pool_layout_unref(d->pool, r->ask.space.layout);
    kvd_pool_namespace_release(d->pool, r->ask.space.ns);
    free(r->have);
    free(r->where);
    free(r->keys);
    free(r->slots);
    free(r->held);
    kvd_upload_free(&r->upload);
    free(r);
}

static void leave(struct kvd_restore *r)
{
    if (--r->users == 0 && r->ended)
        let_go(r);
}

// It runs no more: others may begin, or look again.
static void stop_running(struct kvd_restore *r, enum state state)
{
    struct kvd_restores *all = r->d->restores;
    struct kvd_restore *other;
    if (runs(r)) {
        all->running -= weight(r);
        all->of_namespace[r->ask.space.ns] -= weight(r);
    }
    r->state = state;
    kvd_room_forget(r->d, &r->room);
    DL_FOREACH2(all->all, other, next_one)
    {
        if (other->state == FOLLOWS)
            other->state = PLANS;
    }
    wake(r->d);
}

// Where the time went of one that has fetched.
static void count_time(const struct kvd_restore *r)
{
    struct kvd_restores *all = r->d->restores;
    uint64_t now = uv_hrtime(), fetching = now - r->fetched_ns;
    uint64_t copying = kvd_upload_ran_ns(r->upload);
    kvd_histogram_add(&all->counts.seconds, now - r->begun_ns);
    all->counts.looks_ns += r->fetched_ns - r->begun_ns;
    all->counts.copies_ns += copying;
    all->counts.copies += kvd_upload_copies(r->upload);
    all->counts.waits_ns += fetching > copying ? fetching - copying : 0;
}

static void finish(struct kvd_restore *r)
{
    if (r->state == DONE)
        return;
    if (r->state == FETCHES)
        count_time(r);
    stop_running(r, DONE);
    r->done(r->ctx, &r->answer);
}

void kvd_restore_end(struct kvd_restore **restore)
{
    struct kvd_restore *r = KVD_TAKE(*restore);
    struct kvd_restores *all = r ? r->d->restores : NULL;
    if (!r)
        return;
    stop_running(r, DONE);
    DL_DELETE2(all->all, r, prev, next_one);
    if (!all->all)
        uv_timer_stop(&all->timer);
    if (r->upload) {
        take_in_all(r); // of what was held, to be put down
        kvd_upload_cancel(r->upload);
    }
    r->ended = true;
    r->users++;
    leave(r);
}

// -- looking ------------------------------------------------------------------------------------

static uint32_t at_of(const struct kvd_restore *r, uint32_t block, uint32_t plane)
{
    return block * r->planes + plane;
}

static bool is_there(const struct kvd_restore *r, uint32_t block, uint32_t plane)
{
    return r->have[block] & 1u << plane || r->where[at_of(r, block, plane)];
}

// Whether nothing behind `block` can be used, as a plane without a window lacks it.
static bool breaks(const struct kvd_restore *r, uint32_t block)
{
    if (r->ask.pages)
        return false;
    for (uint32_t p = 0; p < r->planes; p++)
        if (!r->layout->planes[p].window && !is_there(r, block, p))
            return true;
    return false;
}

struct asking {
    struct kvd_restore *of;
    uint32_t begin, end; // blocks
};

static void on_found(void *ctx, const uint8_t *where)
{
    struct asking *a = ctx;
    struct kvd_restore *r = a->of;
    r->asked = false;
    for (uint32_t b = a->begin; b < a->end; b++)
        for (uint32_t p = 0; p < r->planes; p++)
            if (!(r->have[b] & 1u << p))
                r->where[at_of(r, b, p)] = *where++;
    bool over = a->end == r->ask.n;
    for (uint32_t b = a->begin; b < a->end && !over; b++)
        over = breaks(r, b);
    r->looked = a->end;
    if (over && r->state == LOOKS)
        r->state = PLANS;
    wake(r->d);
    free(a);
    leave(r);
}

// Asks the tiers for the next blocks' pages that the pool lacks.
static void look(struct kvd_restore *r)
{
    struct kvd_tier_key keys[LOOKED];
    struct asking *a = malloc(sizeof(*a));
    uint32_t n = 0, b = r->looked;
    for (; a && b < r->ask.n && n + r->planes <= LOOKED; b++)
        for (uint32_t p = 0; p < r->planes; p++) {
            struct kvd_tier_key *key = &r->keys[at_of(r, b, p)];
            if (r->have[b] & 1u << p)
                continue;
            if (kvd_tiers_key(r->d, r->ask.space.domain, r->digest, r->ask.keys[b].w, p, key, NULL))
                memset(key, 0, sizeof(*key));
            keys[n++] = *key;
        }
    if (a)
        *a = (struct asking){r, r->looked, b};
    if (a && n && kvd_tiers_has(r->d, keys, n, on_found, a, NULL) == KVD_OK) {
        r->users++;
        r->asked = true;
        return;
    }
    free(a);
    r->looked = n ? r->looked : b;
    if (n || r->looked == r->ask.n)
        r->state = PLANS;
}

// What the pool has; returns how many leading blocks are known.
static uint32_t look_at_pool(struct kvd_restore *r)
{
    const struct kvd_restore_ask *a = &r->ask;
    if (!a->pages)
        return kvd_blocks_planes(r->d->pool, &a->space, a->keys, a->n, r->have);
    kvd_blocks_page_planes(r->d->pool, &a->space, a->keys, a->n, r->have);
    for (uint32_t b = 0; a->skip && b < a->n; b++)
        if (a->skip[b])
            r->have[b] = UINT8_MAX;
    return 0;
}

static void begin_look(struct kvd_restore *r)
{
    struct kvd_restores *all = r->d->restores;
    size_t n = r->ask.n, np = n * r->planes;
    r->have = calloc(n, 1);
    r->where = calloc(np, 1);
    r->keys = calloc(np, sizeof(*r->keys));
    r->slots = r->ask.ms ? calloc(n, sizeof(*r->slots)) : NULL;
    r->held = r->ask.pages ? calloc(n, sizeof(*r->held)) : NULL;
    r->begun_ns = uv_hrtime();
    r->state = LOOKS;
    all->running += weight(r);
    all->of_namespace[r->ask.space.ns] += weight(r);
    if (!r->have || !r->where || !r->keys || (r->ask.ms && !r->slots) || (r->ask.pages && !r->held))
        finish(r);
    else
        look_at_pool(r);
}

// -- planning -----------------------------------------------------------------------------------

// The longest cut for which every plane has what is seen there, or a tier has.
static uint32_t longest(const struct kvd_restore *r)
{
    uint32_t run[KVD_MAX_PLANES] = {0}, most = 0;
    if (r->ask.pages)
        return r->looked;
    for (uint32_t b = 0; b < r->looked; b++) {
        bool enough = true;
        for (uint32_t p = 0; p < r->planes; p++) {
            run[p] = is_there(r, b, p) ? run[p] + 1 : 0;
            enough &= run[p] >= b + 1 - kvd_blocks_first_seen(&r->layout->planes[p], b + 1);
        }
        most = enough ? b + 1 : most;
    }
    return most;
}

// The planes that lack a block's page and want it for a cut after `to` blocks.
static uint8_t wanted(const struct kvd_restore *r, uint32_t block, uint32_t to)
{
    uint8_t planes = 0;
    for (uint32_t p = 0; p < r->planes; p++) {
        if (r->ask.pages && !is_there(r, block, p))
            return 0;
        if (r->ask.pages || block >= kvd_blocks_first_seen(&r->layout->planes[p], to))
            planes |= (uint8_t)(1u << p);
    }
    return planes & (uint8_t)~r->have[block];
}

// Of those that fetch, one that will bring back what this one wants first.
static bool follows(const struct kvd_restore *r)
{
    const struct kvd_restore *other;
    DL_FOREACH2(r->d->restores->all, other, next_one)
    {
        // What is held waits for another itself, which may be this one.
        if (other->state == FETCHES && !other->holds && r->front >= other->front &&
            r->front < other->to && other->ask.space.ns == r->ask.space.ns &&
            !memcmp(other->ask.space.domain, r->ask.space.domain, sizeof(r->ask.space.domain)) &&
            !memcmp(&other->ask.keys[r->front], &r->ask.keys[r->front], sizeof(*r->ask.keys)))
            return true;
    }
    return false;
}

static void pump(struct kvd_restore *r);
static void moved(void *ctx, bool ended, int rc);

static bool begin_upload(struct kvd_restore *r)
{
    if (!r->upload)
        r->upload = kvd_upload_new(r->d, r->ask.space.ns, &r->flow, moved, r);
    return r->upload;
}

static void plan(struct kvd_restore *r)
{
    struct kvd_restores *all = r->d->restores;
    r->known = look_at_pool(r);
    r->to = longest(r);
    memset(r->answer.behind, 0, sizeof(r->answer.behind));
    r->front = r->to;
    for (uint32_t b = r->to; b-- > 0;) {
        uint8_t planes = wanted(r, b, r->to), far = 0;
        for (uint32_t p = 0; p < r->planes; p++)
            if (planes & 1u << p)
                far = KVD_MAX(far, r->where[at_of(r, b, p)]);
        if (far)
            r->answer.behind[far - 1]++;
        if (far || (b >= r->known && !r->ask.pages))
            r->front = b;
    }
    if (r->ask.pages && r->front == r->to) {
        finish(r);
    } else if (r->to <= r->ask.from || !r->ask.ms) {
        if (r->to <= r->ask.from)
            memset(r->answer.behind, 0, sizeof(r->answer.behind));
        finish(r);
    } else if (follows(r)) {
        all->counts.followed++;
        r->state = FOLLOWS;
    } else if (!begin_upload(r)) {
        finish(r);
    } else if (!r->ask.pages &&
               kvd_blocks_behind(r->d->pool, &r->ask.space, r->ask.keys, r->front, &r->at, NULL)) {
        finish(r);
    } else {
        r->state = FETCHES;
        r->fetched_ns = uv_hrtime();
        r->next = r->sent = r->come = r->front;
        r->answer.begin = r->answer.end = KVD_MAX(r->front, r->known);
        pump(r);
    }
}

// -- fetching -----------------------------------------------------------------------------------

struct getting {
    struct kvd_restore *of;
    uint32_t block, plane;
    uint64_t bytes;
};

static void on_got(void *ctx, struct kvd_block *block, uint32_t tier)
{
    struct getting *g = ctx;
    struct kvd_restore *r = g->of;
    struct slot *s = &r->slots[g->block];
    s->left--;
    s->got[g->plane] = block;
    s->tier = KVD_MAX(s->tier, (uint8_t)tier);
    if (!block && r->state == FETCHES) {
        r->d->restores->counts.missed++;
        fly(r, -(int64_t)g->bytes);
        s->planes = r->ask.pages ? 0 : s->planes;
        r->to = r->ask.pages ? r->to : KVD_MIN(r->to, KVD_MAX(g->block, r->front));
    }
    free(g);
    if (r->state == FETCHES)
        pump(r);
    leave(r);
}

// False: it cannot be had.
static bool get(struct kvd_restore *r, uint32_t block, uint32_t plane)
{
    struct kvd_daemon *d = r->d;
    enum kvd_pool_kind kind = kvd_blocks_kind(r->layout, plane, block);
    struct getting *g = malloc(sizeof(*g));
    if (!g)
        return false;
    *g = (struct getting){r, block, plane,
                          kvd_pool_page_bytes(d->pool, r->ask.space.layout, plane, kind)};
    r->users++;
    r->slots[block].left++;
    if (kvd_tiers_get(d, &r->keys[at_of(r, block, plane)], r->digest, g->bytes, on_got, g, NULL) ==
        KVD_OK) {
        fly(r, (int64_t)g->bytes);
        return true;
    }
    r->users--;
    r->slots[block].left--;
    free(g);
    return false;
}

static void get_more(struct kvd_restore *r)
{
    const uint64_t *of_all = &r->d->restores->flying;
    const uint64_t least = (uint64_t)weight(r) * FLYING_LEAST;
    while (r->next < r->to && r->flying < (*of_all < FLYING_OF_ALL ? FLYING_BYTES : least)) {
        struct slot *s = &r->slots[r->next];
        s->planes = wanted(r, r->next, r->to);
        bool all = true;
        for (uint32_t p = 0; p < r->planes && all; p++)
            all = !(s->planes & 1u << p) || get(r, r->next, p);
        if (!all)
            r->to = r->next;
        else
            r->next++;
    }
}

// What was got for a slot is used, or not wanted.
static void empty_slot(struct kvd_restore *r, struct slot *s, bool good)
{
    for (uint32_t p = 0; p < r->planes; p++)
        if (s->got[p]) {
            fly(r, -(int64_t)s->got[p]->bytes);
            r->d->restores->counts.bytes += good ? s->got[p]->bytes : 0;
            kvd_block_unref(&s->got[p]);
        }
}

// Gives the pool a block that comes next. False: it does not take it, nor what is behind it.
static bool bring_back(struct kvd_restore *r, struct slot *s)
{
    struct kvd_pool *pool = r->d->pool;
    if (!r->ask.pages)
        return kvd_blocks_bring_back(pool, &s->load, &r->at, NULL) == KVD_OK;
    const struct kvd_prefix_key *after = r->front ? &r->ask.keys[r->front - 1] : r->ask.after;
    if (s->planes &&
        kvd_blocks_bring_back_page(pool, &s->load, after, &r->held[r->n_held], NULL) == KVD_OK) {
        r->n_held++;
        kvd_parts_blocks_stored(r->d, r->ask.space.ns, &r->ask.keys[r->front], 1, after);
        return true;
    }
    s->planes = 0;
    kvd_blocks_put_down(pool, &s->load);
    return true;
}

static void count_back(struct kvd_restore *r, const struct slot *s)
{
    struct kvd_restores *all = r->d->restores;
    r->answer.restored += s->planes != 0;
    r->front++;
    r->answer.end = KVD_MAX(r->answer.end, r->front);
    all->counts.blocks[s->tier] += s->planes != 0;
}

// Takes in a block that has come, or was given up. What is behind one that is not good is not taken
// in.
static void take_in(struct kvd_restore *r, bool copied)
{
    struct slot *s = &r->slots[r->come];
    bool good = copied && r->state == FETCHES && r->come == r->front;
    empty_slot(r, s, good);
    good = good && bring_back(r, s);
    r->come++;
    if (good) {
        count_back(r, s);
    } else {
        kvd_blocks_put_down(r->d->pool, &s->load);
        r->to = KVD_MIN(r->to, r->front);
    }
}

static void take_in_all(struct kvd_restore *r)
{
    if (r->holds && r->state == FETCHES) {
        // Of an upload that has ended before its time, which this waits to take in, there is no
        // more.
        uint32_t held = r->sent - r->come;
        if (!kvd_upload_runs(r->upload) && kvd_upload_done(r->upload) != r->uploaded + held)
            r->to = KVD_MIN(r->to, r->come);
        return;
    }
    for (uint32_t n = kvd_upload_done(r->upload); r->uploaded != n; r->uploaded++)
        take_in(r, true);
    while (!kvd_upload_runs(r->upload) && r->come < r->sent)
        take_in(r, false);
}

void kvd_restore_go(struct kvd_restore *r)
{
    r->holds = false;
    if (r->state != FETCHES)
        return;
    take_in_all(r);
    pump(r);
}

static void moved(void *ctx, bool ended, int rc)
{
    struct kvd_restore *r = ctx;
    (void)rc; // it was told where it was found
    take_in_all(r);
    if (r->state == FETCHES)
        pump(r);
    if (ended)
        leave(r);
}

// For the next block. False: it has to wait.
static bool make_room(struct kvd_restore *r, const struct slot *s)
{
    struct kvd_pool_need need = {0};
    uint32_t layout = r->ask.space.layout;
    if (r->room.waits)
        return false;
    for (uint32_t p = 0; p < r->planes; p++) {
        enum kvd_pool_kind kind = kvd_blocks_kind(r->layout, p, r->sent);
        if (!(s->planes & 1u << p))
            continue;
        need.pages[p][kind]++;
        need.bytes += kvd_pool_page_bytes(r->d->pool, layout, p, kind);
    }
    return kvd_room_make(r->d, &r->room, r->ask.space.ns, layout, &need);
}

static void on_room(struct kvd_daemon *d, struct kvd_room *room)
{
    struct kvd_restore *r =
        (struct kvd_restore *)((uint8_t *)room - offsetof(struct kvd_restore, room));
    (void)d;
    if (r->state == FETCHES)
        pump(r);
}

// Takes pages for the next block that is here, and has it copied. False: there is none, or no room.
static bool send_next(struct kvd_restore *r)
{
    struct kvd_upload_copy copies[KVD_MAX_PLANES];
    struct slot *s = &r->slots[r->sent];
    uint32_t n = 0;
    if (r->sent >= KVD_MIN(r->next, r->to) || s->left || !kvd_upload_has_room(r->upload))
        return false;
    if (!make_room(r, s))
        return false; // for now
    if (kvd_blocks_new_pages(r->d->pool, &r->ask.space, &r->ask.keys[r->sent], r->sent, s->planes,
                             &s->load, NULL)) {
        r->to = r->sent;
        return false;
    }
    for (uint32_t p = 0; p < r->planes; p++) {
        const struct kvd_blocks_page *to = &s->load.plane[p];
        if (to->page != KVD_POOL_NONE)
            copies[n++] = (struct kvd_upload_copy){.to = to->addr,
                                                   .from = (uintptr_t)s->got[p]->payload,
                                                   .bytes = to->bytes,
                                                   .to_in = to->extent,
                                                   .from_in = kvd_block_place(s->got[p])};
    }
    r->users += !kvd_upload_runs(r->upload);
    kvd_upload_add(r->upload, copies, n);
    r->sent++;
    return true;
}

// Of pages, those that are not wanted or did not come are left out before the next one is sent.
static void leave_out(struct kvd_restore *r)
{
    while (r->ask.pages && r->come == r->sent && r->sent < r->next && !r->slots[r->sent].planes &&
           !r->slots[r->sent].left) {
        empty_slot(r, &r->slots[r->front++], false);
        r->sent = r->come = r->front;
    }
}

static void pump(struct kvd_restore *r)
{
    do {
        get_more(r);
        leave_out(r);
        while (send_next(r))
            ;
    } while (r->come == r->sent && r->front == r->next && r->next < r->to); // all were left out
    if (r->come == r->sent && r->front >= r->to)
        finish(r);
}

// -- all of them --------------------------------------------------------------------------------

static bool may_run(const struct kvd_restore *r)
{
    const struct kvd_restores *all = r->d->restores;
    // Those that wait for others leave room for these.
    const uint32_t share = r->holds ? 2 : 1;
    return all->running + weight(r) <= MOST_RUNNING / share &&
           all->of_namespace[r->ask.space.ns] + weight(r) <= MOST_OF_NAMESPACE / share;
}

// Something that one of them does at once. False: none has anything to do.
static bool step(struct kvd_daemon *d)
{
    struct kvd_restore *r;
    DL_FOREACH2(d->restores->all, r, next_one)
    {
        if (r->state == WAITS && may_run(r))
            begin_look(r);
        else if (r->state == LOOKS && !r->asked)
            look(r);
        else if (r->state == PLANS)
            plan(r);
        else
            continue;
        return true;
    }
    return false;
}

static void on_idle(uv_idle_t *idle)
{
    struct kvd_daemon *d = idle->data;
    uint64_t begin = uv_hrtime();
    while (step(d))
        if (uv_hrtime() - begin >= PIECE_NS)
            return;
    uv_idle_stop(idle);
}

// What takes too long has what has come until now.
static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_restore *r, *tmp;
    DL_FOREACH_SAFE2(d->restores->all, r, tmp, next_one)
    {
        if (r->state == DONE || kvd_now_ms(d) < r->until_ms)
            continue;
        r->to = KVD_MIN(r->to, r->front);
        if (r->come == r->sent)
            finish(r);
    }
}

struct kvd_restore *kvd_restore_begin(struct kvd_daemon *d, const struct kvd_restore_ask *ask,
                                      kvd_restore_done *done, void *ctx, struct kvd_error *err)
{
    struct kvd_restores *all = d->restores;
    struct kvd_pool_namespace_info info;
    struct kvd_restore *r = all ? calloc(1, sizeof(*r)) : NULL;
    uint32_t ns;
    if (!r) {
        kvd_fail(err, all ? KVD_E_INTERNAL : KVD_E_UNAVAILABLE,
                 all ? "out of memory" : "there are no tiers");
        return NULL;
    }
    kvd_pool_namespace_info(d->pool, ask->space.ns, &info);
    if (kvd_pool_namespace(d->pool, info.name, &ns, err)) {
        free(r);
        return NULL;
    }
    kvd_pool_layout_ref(d->pool, ask->space.layout);
    r->d = d;
    r->ask = *ask;
    r->done = done;
    r->ctx = ctx;
    r->holds = ask->holds;
    r->layout = kvd_pool_layout_get(d->pool, ask->space.layout);
    r->planes = r->layout->n_planes;
    r->room.again = on_room;
    kvd_layout_digest_bytes(r->layout, r->digest);
    r->until_ms = kvd_now_ms(d) + (ask->ms ? ask->ms : d->config.tier_timeout_ms);
    if (!all->all)
        uv_timer_start(&all->timer, on_timer, TICK_MS, TICK_MS);
    DL_APPEND2(all->all, r, prev, next_one);
    wake(d);
    return r;
}

// -- the part -----------------------------------------------------------------------------------

static int start(struct kvd_daemon *d, struct kvd_error *err)
{
    if (!kvd_tiers_count(d))
        return KVD_OK;
    d->restores = calloc(1, sizeof(*d->restores));
    if (!d->restores)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_idle_init(&d->loop, &d->restores->idle);
    uv_timer_init(&d->loop, &d->restores->timer);
    d->restores->idle.data = d->restores->timer.data = d;
    return KVD_OK;
}

// No call is left by then, and no tier.
static void end(struct kvd_daemon *d)
{
    if (!d->restores)
        return;
    uv_close((uv_handle_t *)&d->restores->idle, NULL);
    uv_close((uv_handle_t *)&d->restores->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->restores));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    const struct kvd_restores *all = d->restores;
    if (all)
        kvd_restore_counts_metrics(d, f, &all->counts, (double)all->running / WEIGHT);
}

const struct kvd_part kvd_part_restores = {
    .start = start, .end = end, .deinit = deinit, .metrics = metrics};

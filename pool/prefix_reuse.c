// Which leaf to evict: the one whose memory earns the fewest hits, by what has been seen so far.
//
// Every use begins a life, which the next use of that block ends. For each class (how often a block
// has been used) and age (time since its last use) it is counted how many lives reached the age and
// how many ended at it. That gives the chance of a hit at each age still to come, and from those
// the most hits that a block can earn per time that it is kept, over the best time to keep it (the
// Gittins index). Blocks lie on shelves by class and tick of their last use, shelves are ranked
// once a tick, and the lowest shelf that is not empty gives a leaf.
//
// So there is nothing to set: one-time prompts sink because their class is seen to be used seldom,
// and where recency tells all, as with agents, the order is that of recency. Before anything has
// been seen it is that too.
//
// Blocks that are gone leave a ghost of 4 bytes (a tag, number of uses, tick), without which it
// would not be seen that they were wanted again: what happens at ages beyond those that eviction
// lets blocks reach could not be learned, and a block could not become a much-used one.
//
// What its owner said of a block goes before all that: each class has shelves of its own, ranked
// alike, and the lowest class that has leaves gives one.
//
// Entries have a tick and no time, which would be 4 bytes more. How long ago a block was used is
// known from when its tick began, so to within a tick: a 32nd of what fills the index once.
#include "pool/prefix_internal.h"

#include <math.h>
#include <time.h>

enum {
    // Ages by how long ago, fine where they are young.
    FINE = 32,   // of a tick each
    MIDDLE = 16, // of MIDDLE_TICKS
    MIDDLE_TICKS = 8,
    COARSE = 16, // of COARSE_TICKS; the last stands for all beyond
    COARSE_TICKS = 64,
    FIRST_TICK = 4096,   // before it lies more than all ages
    TICKS_PER_FILL = 32, // a tick is as many uses as a part of the entries that there are
    MIN_TICK = 64,
    GHOST_TICKS = 1024, // ticks of ghosts wrap
    GHOST_OLD = 896,    // ghosts older than this go, before they wrap
    LOOKS = 16,         // at leased leaves, for one that is wanted
    GHOST_SWEEPS = 64,  // in this many ticks all ghosts are looked at
};
static const double FADE = 0.9995; // of what was seen, per tick
static const double DOUBT = 0.5;   // lives that never ended, added to what was seen at each age

static uint32_t uses_of(const struct prefix_entry *e)
{
    return e->uses & REUSE_MAX_USES;
}

// Which of REUSE_ORDERS.
static uint32_t order_of(const struct prefix_entry *e)
{
    return e->uses & REUSE_LOW ? 0 : e->uses & REUSE_HIGH ? 2 : 1;
}

static uint32_t class_of(uint32_t uses)
{
    return uses <= 1 ? 0 : uses <= 2 ? 1 : uses <= 4 ? 2 : uses <= 8 ? 3 : uses <= 16 ? 4 : 5;
}

// Ticks that are near each other share a bucket, which it keeps while it is as old as its kind: the
// youngest FINE ticks have one each; those before, groups of MIDDLE_TICKS; those before, groups of
// COARSE_TICKS. Lives are counted by bucket, and leaves lie on shelves by bucket. What time does is
// to put a bucket into the next kind's.

static uint32_t youngest_middle(const struct prefix_reuse *r)
{
    return (r->tick - FINE) / MIDDLE_TICKS;
}
static uint32_t youngest_coarse(const struct prefix_reuse *r)
{
    return (youngest_middle(r) - MIDDLE) / (COARSE_TICKS / MIDDLE_TICKS);
}

static uint32_t bucket_of(const struct prefix_reuse *r, uint32_t tick)
{
    if (r->tick - tick < FINE)
        return tick % FINE;
    uint32_t group = tick / MIDDLE_TICKS;
    if (youngest_middle(r) - group < MIDDLE)
        return FINE + group % MIDDLE;
    uint32_t youngest = youngest_coarse(r);
    group = KVD_MAX(tick / COARSE_TICKS, youngest - (COARSE - 1));
    return FINE + MIDDLE + group % COARSE;
}

// The age of a bucket, 0 to REUSE_AGES - 1.
static uint32_t age_of(const struct prefix_reuse *r, uint32_t bucket)
{
    if (bucket < FINE)
        return (r->tick - bucket) % FINE;
    if (bucket < FINE + MIDDLE)
        return FINE + (youngest_middle(r) - (bucket - FINE)) % MIDDLE;
    return FINE + MIDDLE + (youngest_coarse(r) - (bucket - FINE - MIDDLE)) % COARSE;
}

static uint32_t ticks_of(uint32_t age)
{
    return age < FINE ? 1 : age < FINE + MIDDLE ? MIDDLE_TICKS : COARSE_TICKS;
}

// A life that began at `tick` is over.
static void end_life(struct prefix_reuse *r, uint32_t uses, uint32_t tick, bool used)
{
    uint32_t bucket = bucket_of(r, tick);
    r->lives[class_of(uses)][bucket]--;
    if (used)
        r->ended[class_of(uses)][age_of(r, bucket)]++;
}

static void begin_life(struct prefix_reuse *r, uint32_t uses)
{
    r->lives[class_of(uses)][bucket_of(r, r->tick)]++;
    r->uses++;
}

// -- lists --------------------------------------------------------------------------------------
// A list's ends are told by numbers beyond those of entries, so that an entry can be taken off
// without knowing its list.

static uint32_t *next_of(struct kvd_prefix *ix, uint32_t at)
{
    uint32_t n = ix->head->config.entries;
    return at < n ? &ix->entry[at].next : &ix->head->list[at - n].first;
}

static uint32_t *prev_of(struct kvd_prefix *ix, uint32_t at)
{
    uint32_t n = ix->head->config.entries;
    return at < n ? &ix->entry[at].prev : &ix->head->list[at - n].last;
}

static void list_clear(struct kvd_prefix *ix, uint32_t list)
{
    uint32_t end = ix->head->config.entries + list;
    ix->head->list[list] = (struct prefix_list){end, end};
}

static bool list_empty(const struct kvd_prefix *ix, uint32_t list)
{
    return ix->head->list[list].first == ix->head->config.entries + list;
}

static void list_add(struct kvd_prefix *ix, uint32_t list, uint32_t entry)
{
    uint32_t end = ix->head->config.entries + list, last = *prev_of(ix, end);
    ix->entry[entry].prev = last;
    ix->entry[entry].next = end;
    *next_of(ix, last) = entry;
    *prev_of(ix, end) = entry;
}

// Puts all of `from` behind what is in `to`.
static void list_join(struct kvd_prefix *ix, uint32_t to, uint32_t from)
{
    if (list_empty(ix, from))
        return;
    struct prefix_list moved = ix->head->list[from];
    uint32_t end = ix->head->config.entries + to, last = *prev_of(ix, end);
    *prev_of(ix, moved.first) = last;
    *next_of(ix, last) = moved.first;
    *next_of(ix, moved.last) = end;
    *prev_of(ix, end) = moved.last;
    list_clear(ix, from);
}

// -- shelves ------------------------------------------------------------------------------------

static uint32_t shelf_of(const struct prefix_reuse *r, uint32_t uses, uint32_t tick)
{
    return class_of(uses) * REUSE_AGES + bucket_of(r, tick);
}

void leaf_file(struct kvd_prefix *ix, uint32_t entry)
{
    struct prefix_reuse *r = &ix->head->reuse;
    if (ix->entry[entry].uses & REUSE_DEMOTED) {
        list_add(ix, LIST_DEMOTED, entry);
        return;
    }
    uint32_t order = order_of(&ix->entry[entry]);
    uint32_t shelf = shelf_of(r, uses_of(&ix->entry[entry]), ix->entry[entry].tick);
    uint32_t rank = r->rank_of[shelf];
    r->filled[order][rank / 64] |= 1ull << rank % 64;
    list_add(ix, order * REUSE_SHELVES + shelf, entry);
}

void leaf_unfile(struct kvd_prefix *ix, uint32_t entry)
{
    struct prefix_entry *e = &ix->entry[entry];
    *next_of(ix, e->prev) = e->next;
    *prev_of(ix, e->next) = e->prev;
    e->prev = e->next = KVD_PREFIX_NONE;
}

static void put_aside(struct kvd_prefix *ix, uint32_t entry)
{
    ix->head->reuse.lease_ends = KVD_MIN(ix->head->reuse.lease_ends, ix->entry[entry].lease);
    list_add(ix, LIST_LEASED, entry);
}

// Puts leaves that were put aside and whose lease is over back on their shelves; looks at `most` of
// them, in turn, if any lease can be over at all. Returns whether there were any.
static bool look_at_leased(struct kvd_prefix *ix, uint32_t now, uint32_t most)
{
    struct prefix_head *h = ix->head;
    uint32_t last = h->list[LIST_LEASED].last, entry = KVD_PREFIX_NONE, ends = UINT32_MAX;
    bool any = false;
    if (now < h->reuse.lease_ends || list_empty(ix, LIST_LEASED))
        return false;
    for (uint32_t i = 0; i < most && entry != last; i++) {
        entry = h->list[LIST_LEASED].first;
        leaf_unfile(ix, entry);
        if (ix->entry[entry].lease > now) {
            list_add(ix, LIST_LEASED, entry);
            ends = KVD_MIN(ends, ix->entry[entry].lease);
        } else {
            leaf_file(ix, entry);
            any = true;
        }
    }
    if (entry == last)
        h->reuse.lease_ends = ends;
    return any;
}

// The first leaf of a list whose lease is over; those before it are put aside.
static uint32_t first_of(struct kvd_prefix *ix, uint32_t list, uint32_t now)
{
    while (!list_empty(ix, list)) {
        uint32_t entry = ix->head->list[list].first;
        if (ix->entry[entry].lease <= now)
            return entry;
        leaf_unfile(ix, entry);
        put_aside(ix, entry);
    }
    return KVD_PREFIX_NONE;
}

static uint32_t lowest_of(struct kvd_prefix *ix, uint32_t order, uint32_t now)
{
    const struct prefix_reuse *r = &ix->head->reuse;
    uint64_t *filled = ix->head->reuse.filled[order];
    for (size_t word = 0; word < KVD_LEN(r->filled[0]); word++)
        while (filled[word]) {
            uint32_t rank = (uint32_t)word * 64 + (uint32_t)__builtin_ctzll(filled[word]);
            uint32_t entry = first_of(ix, order * REUSE_SHELVES + r->shelf_at[rank], now);
            if (entry != KVD_PREFIX_NONE)
                return entry;
            filled[word] &= ~(1ull << rank % 64);
        }
    return KVD_PREFIX_NONE;
}

static uint32_t lowest(struct kvd_prefix *ix, uint32_t now)
{
    uint32_t entry = first_of(ix, LIST_DEMOTED, now);
    for (uint32_t order = 0; order < REUSE_ORDERS && entry == KVD_PREFIX_NONE; order++)
        entry = lowest_of(ix, order, now);
    return entry;
}

uint32_t leaf_choose(struct kvd_prefix *ix, uint32_t now)
{
    look_at_leased(ix, now, LOOKS);
    uint32_t entry = lowest(ix, now);
    // Only where leases keep all that is left are all of them looked at, and not again before one
    // of them has ended.
    if (entry == KVD_PREFIX_NONE && look_at_leased(ix, now, UINT32_MAX))
        entry = lowest(ix, now);
    return entry;
}

// -- ranks --------------------------------------------------------------------------------------

// The chances that a life of the class that reached an age ends in a tick of it. Few are seen at
// each of the later ages, so a part of those beside it count too.
static void chances(const struct prefix_reuse *r, uint32_t class, double out[REUSE_AGES])
{
    for (int age = 0; age < REUSE_AGES; age++) {
        int around = age < FINE ? age / 4 : 1;
        double ended = 0, seen = DOUBT;
        for (int a = age - around; a <= age + around && a < REUSE_AGES; a++) {
            ended += r->ended[class][a];
            seen += r->seen[class][a];
        }
        out[age] = fmin(ended / seen, 1);
    }
}

// By age, hits per time kept, over the time to keep it that gives the most.
static void worths(const double chance[REUSE_AGES], double out[REUSE_AGES])
{
    double hit[REUSE_AGES], keep[REUSE_AGES]; // in all ticks of an age, of what reached it
    for (uint32_t a = 0; a < REUSE_AGES; a++) {
        hit[a] = 1 - pow(1 - chance[a], ticks_of(a));
        keep[a] = chance[a] > 1e-9 ? hit[a] / chance[a] : ticks_of(a);
    }
    for (int age = 0; age < REUSE_AGES; age++) {
        double left = 1, hits = 0, kept = 0;
        out[age] = 0;
        for (int a = age; a < REUSE_AGES; a++) {
            hits += left * hit[a];
            kept += left * keep[a];
            left *= 1 - hit[a];
            out[age] = fmax(out[age], hits / kept);
        }
    }
}

struct ranked {
    double worth;
    uint32_t age, shelf;
};

static int by_worth(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;
    if (x->worth != y->worth)
        return x->worth < y->worth ? -1 : 1;
    if (x->age != y->age)
        return x->age > y->age ? -1 : 1;
    return x->shelf < y->shelf ? -1 : x->shelf > y->shelf;
}

static void rank_shelves(struct kvd_prefix *ix)
{
    struct prefix_reuse *r = &ix->head->reuse;
    struct ranked ranked[REUSE_SHELVES];
    for (uint32_t class = 0; class < REUSE_CLASSES; class ++) {
        double chance[REUSE_AGES], worth[REUSE_AGES];
        chances(r, class, chance);
        worths(chance, worth);
        for (uint32_t bucket = 0; bucket < REUSE_AGES; bucket++) {
            uint32_t age = age_of(r, bucket), shelf = class * REUSE_AGES + bucket;
            ranked[shelf] = (struct ranked){worth[age], age, shelf};
        }
    }
    qsort(ranked, REUSE_SHELVES, sizeof(ranked[0]), by_worth);
    memset(r->filled, 0, sizeof(r->filled));
    for (uint32_t rank = 0; rank < REUSE_SHELVES; rank++) {
        uint32_t shelf = ranked[rank].shelf;
        r->shelf_at[rank] = (uint16_t)shelf;
        r->rank_of[shelf] = (uint16_t)rank;
        for (uint32_t order = 0; order < REUSE_ORDERS; order++)
            if (!list_empty(ix, order * REUSE_SHELVES + shelf))
                r->filled[order][rank / 64] |= 1ull << rank % 64;
    }
}

// -- ghosts -------------------------------------------------------------------------------------
// tag (16 bits), uses (5), tick (10), 1.

static uint32_t *ghost_set(struct kvd_prefix *ix, uint64_t hash)
{
    return ix->ghost + (size_t)prefix_place(hash, ix->head->ghost_sets) * GHOST_WAYS;
}

static uint32_t ghost_tag(uint64_t hash)
{
    return (uint32_t)(hash & 0xffff) << 16;
}

static uint32_t ghost_age(const struct prefix_reuse *r, uint32_t ghost)
{
    return (r->tick - (ghost >> 1)) % GHOST_TICKS;
}

static void ghost_put(struct kvd_prefix *ix, uint64_t hash, uint32_t uses, uint32_t tick)
{
    const struct prefix_reuse *r = &ix->head->reuse;
    uint32_t *set = ghost_set(ix, hash);
    if (r->tick - tick > GHOST_OLD)
        return;
    memmove(set + 1, set, (GHOST_WAYS - 1) * sizeof(*set));
    set[0] = ghost_tag(hash) | uses << 11 | tick % GHOST_TICKS << 1 | 1;
}

// How often the block had been used before it went; 0: not known. Its life is over.
static uint32_t ghost_take(struct kvd_prefix *ix, uint64_t hash)
{
    struct prefix_reuse *r = &ix->head->reuse;
    uint32_t *set = ghost_set(ix, hash), tag = ghost_tag(hash);
    for (uint32_t way = 0; way < GHOST_WAYS; way++)
        if ((set[way] & 1) && (set[way] & 0xffff0000) == tag) {
            uint32_t uses = set[way] >> 11 & REUSE_MAX_USES;
            end_life(r, uses, r->tick - ghost_age(r, set[way]), true);
            memmove(set + way, set + way + 1, (GHOST_WAYS - 1 - way) * sizeof(*set));
            set[GHOST_WAYS - 1] = 0;
            return uses;
        }
    return 0;
}

static void sweep_ghosts(struct kvd_prefix *ix)
{
    const struct prefix_head *h = ix->head;
    uint64_t ghosts = (uint64_t)h->ghost_sets * GHOST_WAYS, part = h->reuse.tick % GHOST_SWEEPS;
    for (uint64_t i = ghosts * part / GHOST_SWEEPS; i < ghosts * (part + 1) / GHOST_SWEEPS; i++)
        if ((ix->ghost[i] & 1) && ghost_age(&h->reuse, ix->ghost[i]) > GHOST_OLD)
            ix->ghost[i] = 0;
}

// -- time ---------------------------------------------------------------------------------------

// Puts a bucket of every class into another.
static void put_into(struct kvd_prefix *ix, uint32_t to, uint32_t from)
{
    for (uint32_t class = 0; class < REUSE_CLASSES; class ++) {
        double *lives = ix->head->reuse.lives[class];
        lives[to] += lives[from];
        lives[from] = 0;
        for (uint32_t order = 0; order < REUSE_ORDERS; order++) {
            uint32_t first = order * REUSE_SHELVES + class * REUSE_AGES;
            list_join(ix, first + to, first + from);
        }
    }
}

static void tick(struct kvd_prefix *ix)
{
    struct prefix_reuse *r = &ix->head->reuse;
    uint32_t left = r->tick - (FINE - 1), group = left / MIDDLE_TICKS;
    // The new tick's bucket was that of the tick that is no longer fine; a group that begins has
    // the bucket of one that ends, and so on.
    if (left % MIDDLE_TICKS == 0) {
        uint32_t before = group - MIDDLE, coarse = before / (COARSE_TICKS / MIDDLE_TICKS);
        if (before % (COARSE_TICKS / MIDDLE_TICKS) == 0)
            put_into(ix, FINE + MIDDLE + (coarse + 1) % COARSE, FINE + MIDDLE + coarse % COARSE);
        put_into(ix, FINE + MIDDLE + coarse % COARSE, FINE + before % MIDDLE);
    }
    put_into(ix, FINE + group % MIDDLE, left % FINE);
    r->tick++;
    ix->tick_began[r->tick % REUSE_TIMES] = (uint32_t)time(NULL);
    for (uint32_t class = 0; class < REUSE_CLASSES; class ++)
        for (uint32_t bucket = 0; bucket < REUSE_AGES; bucket++) {
            uint32_t age = age_of(r, bucket);
            double *lives = &r->lives[class][bucket];
            if (age == REUSE_AGES - 1) // lives whose ghosts were lost would go on for ever
                *lives *= FADE;
            r->seen[class][age] = r->seen[class][age] * FADE + fmax(*lives, 0);
            r->ended[class][age] *= FADE;
        }
    sweep_ghosts(ix);
}

void reuse_advance(struct kvd_prefix *ix, uint32_t most)
{
    struct prefix_reuse *r = &ix->head->reuse;
    uint64_t span = KVD_MAX(ix->head->entries / TICKS_PER_FILL, (uint32_t)MIN_TICK);
    if (r->uses / span <= most)
        return;
    for (; r->uses >= span; r->uses -= span)
        tick(ix);
    rank_shelves(ix);
}

void reuse_clear(struct kvd_prefix *ix)
{
    struct prefix_head *h = ix->head;
    memset(&h->reuse, 0, sizeof(h->reuse));
    h->reuse.tick = FIRST_TICK;
    h->reuse.lease_ends = UINT32_MAX;
    for (uint32_t i = 0; i < REUSE_TIMES; i++)
        ix->tick_began[i] = (uint32_t)time(NULL);
    for (uint32_t list = 0; list < LISTS; list++)
        list_clear(ix, list);
    rank_shelves(ix);
}

static void begin(struct kvd_prefix *ix, struct prefix_entry *e, uint32_t uses)
{
    uint32_t class = e->uses & (REUSE_LOW | REUSE_HIGH); // and no longer demoted
    uses = KVD_MIN(uses, (uint32_t)REUSE_MAX_USES);
    e->uses = (uint8_t)(uses | class);
    e->tick = ix->head->reuse.tick;
    begin_life(&ix->head->reuse, uses);
}

void reuse_new(struct kvd_prefix *ix, struct prefix_entry *e, uint64_t hash)
{
    e->uses = 0; // KVD_PREFIX_NORMAL
    begin(ix, e, ghost_take(ix, hash) + 1);
}

void reuse_again(struct kvd_prefix *ix, struct prefix_entry *e)
{
    end_life(&ix->head->reuse, uses_of(e), e->tick, true);
    begin(ix, e, uses_of(e) + 1u);
}

void reuse_gone(struct kvd_prefix *ix, const struct prefix_entry *e, uint64_t hash, bool wanted)
{
    if (wanted)
        ghost_put(ix, hash, uses_of(e), e->tick);
    else
        end_life(&ix->head->reuse, uses_of(e), e->tick, false);
}

uint32_t reuse_age(const struct kvd_prefix *ix, const struct prefix_entry *e, uint32_t now)
{
    uint32_t ago = KVD_MIN(ix->head->reuse.tick - e->tick, (uint32_t)REUSE_TIMES - 1);
    uint32_t began = ix->tick_began[(ix->head->reuse.tick - ago) % REUSE_TIMES];
    return now > began ? now - began : 0; // the clock may have been set back
}

void reuse_passed(struct kvd_prefix *ix, uint64_t hash)
{
    struct prefix_reuse *r = &ix->head->reuse;
    uint32_t uses = KVD_MIN(ghost_take(ix, hash) + 1, (uint32_t)REUSE_MAX_USES);
    begin_life(r, uses);
    ghost_put(ix, hash, uses, r->tick);
}

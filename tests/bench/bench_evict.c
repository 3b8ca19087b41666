// What eviction is worth: the share of blocks that requests find, when the prefix index (the real
// one) has room for a part of the blocks that there are, against other policies and the optimum.
// usage: bench_evict [-s SEEDS] [-q] [FOLDER]   FOLDER: of *.txt.xz, see below; none: a generated
// trace; -q: that one only, and short
//
// A trace has a request a line, in order of time: "time session input_tokens output_tokens id…",
// where a run of ids is a-b, and ids are of the session. Only whole blocks count. One request is
// served after the other: it finds a run of leading blocks, computes the others, and all of them
// are then there as far as there is room; none of its blocks is evicted meanwhile. In mixes,
// prompts that are never seen again come between, as long as those of the trace.
//
// All policies evict leaves only. LRU-2 remembers the last two uses of every block for ever, which
// a real one could not; S3-FIFO's ghosts are as many as its main queue. The optimum knows the
// future: it evicts what is used last, and does not keep what is used later than all that is there.
// As a block's next use is never after that of blocks behind it, it never wants to make a hole, and
// so it is exact.
#include <dirent.h>
#include <getopt.h>

#include "pool/prefix.h"
#include "tests/unit/random.h"

enum { NEVER = UINT32_MAX };

struct trace {
    char name[40];
    uint32_t n_requests, n_blocks, n_uses, unique; // unique: without one-time prompts
    uint32_t *begin;                               // by request, and one more: uses
    uint32_t *use;                                 // blocks
    uint32_t *next;                                // by use: the next one of the block, or NEVER
    uint32_t *parent;                              // by block, or KVD_PREFIX_NONE
    uint32_t room_requests, room_blocks, room_uses;
};

static void *grown(void *p, uint32_t n, uint32_t *room)
{
    if (n < *room)
        return p;
    *room = *room ? *room * 2 : 1 << 16;
    p = realloc(p, (size_t)*room * sizeof(uint32_t));
    if (!p)
        abort();
    return p;
}

static void add_use(struct trace *t, uint32_t block)
{
    t->use = grown(t->use, t->n_uses, &t->room_uses);
    t->use[t->n_uses++] = block;
}

static uint32_t add_block(struct trace *t, uint32_t parent)
{
    t->parent = grown(t->parent, t->n_blocks, &t->room_blocks);
    t->parent[t->n_blocks] = parent;
    return t->n_blocks++;
}

static void begin_request(struct trace *t)
{
    t->begin = grown(t->begin, t->n_requests + 1, &t->room_requests);
    t->begin[t->n_requests++] = t->n_uses;
    t->begin[t->n_requests] = t->n_uses;
}

static void end_request(struct trace *t)
{
    t->begin[t->n_requests] = t->n_uses;
}

static void trace_free(struct trace *t)
{
    free(t->begin);
    free(t->use);
    free(t->next);
    free(t->parent);
}

static void find_next(struct trace *t)
{
    uint32_t *last = malloc(t->n_blocks * sizeof(*last));
    memset(last, 0xff, t->n_blocks * sizeof(*last));
    free(t->next);
    t->next = malloc(t->n_uses * sizeof(*t->next));
    for (uint32_t i = t->n_uses; i-- > 0;) {
        t->next[i] = last[t->use[i]];
        last[t->use[i]] = i;
    }
    free(last);
}

// -- traces -------------------------------------------------------------------------------------

struct names { // (session, id) to block
    uint64_t *key;
    uint32_t *block, size;
};

static uint32_t block_of(struct names *m, struct trace *t, uint64_t session, uint64_t id,
                         uint32_t parent)
{
    uint64_t key = (session << 32 | id) + 1;
    uint32_t at = (uint32_t)((key * 0x9e3779b97f4a7c15ull) >> 40) % m->size;
    for (; m->key[at] && m->key[at] != key; at = (at + 1) % m->size)
        continue;
    if (!m->key[at]) {
        m->key[at] = key;
        m->block[at] = add_block(t, parent);
    }
    if (t->parent[m->block[at]] != parent) {
        fprintf(stderr, "%s: block %llu comes behind different ones\n", t->name,
                (unsigned long long)id);
        exit(1);
    }
    return m->block[at];
}

static void read_request(struct trace *t, struct names *m, char *line)
{
    strtod(line, &line);
    uint64_t session = strtoull(line, &line, 10), tokens = strtoull(line, &line, 10);
    strtoull(line, &line, 10);
    begin_request(t);
    char *ids = line;
    uint64_t n = 0;
    for (int pass = 0; pass < 2;
         pass++) { // the first one counts: a last block that is not full goes
        uint32_t parent = KVD_PREFIX_NONE;
        uint64_t block_tokens = n && tokens / n > 128 ? 512 : 64, whole = tokens / block_tokens,
                 i = 0;
        for (line = ids; *line && *line != '\n';) {
            uint64_t a = strtoull(line, &line, 10), b = a;
            if (*line == '-')
                b = strtoull(line + 1, &line, 10);
            for (; a <= b; a++, i++)
                if (pass == 0)
                    n++;
                else if (i < whole)
                    add_use(t, parent = block_of(m, t, session, a, parent));
            while (*line == ' ')
                line++;
        }
    }
    end_request(t);
}

static struct trace read_trace(const char *folder, const char *file)
{
    struct trace t = {0};
    char command[600];
    snprintf(t.name, sizeof(t.name), "%.*s", (int)strcspn(file, "."), file);
    snprintf(command, sizeof(command), "xz -dc '%s/%s'", folder, file);
    FILE *f = popen(command, "r");
    struct names m = {.size = 1 << 22};
    m.key = calloc(m.size, sizeof(*m.key));
    m.block = malloc(m.size * sizeof(*m.block));
    char *line = NULL;
    size_t size = 0;
    while (f && getline(&line, &size, f) > 0)
        read_request(&t, &m, line);
    if (!f || pclose(f) || !t.n_requests) {
        fprintf(stderr, "cannot read %s/%s\n", folder, file);
        exit(1);
    }
    free(line);
    free(m.key);
    free(m.block);
    t.unique = t.n_blocks;
    return t;
}

// Conversations that share one of 20 system prompts and go on turn by turn, some for long.
static struct trace make_trace(uint32_t requests, uint64_t seed)
{
    enum { SYSTEMS = 20, LIVE = 400, MOST = 200 };
    struct trace t = {.name = "generated"};
    static uint32_t path[LIVE][MOST], length[LIVE], system_prompt[SYSTEMS][16];
    memset(length, 0, sizeof(length));
    for (int i = 0; i < SYSTEMS; i++)
        for (int k = 0; k < 16; k++)
            system_prompt[i][k] = add_block(&t, k ? system_prompt[i][k - 1] : KVD_PREFIX_NONE);
    uint64_t rng = seed * 0x9e3779b97f4a7c15ull | 1;
    for (uint32_t r = 0; r < requests; r++) {
        uint32_t who = (uint32_t)(kvd_rand(&rng) >> 40) % LIVE,
                 grow = 1 + (kvd_rand(&rng) >> 40) % 12;
        who = (uint32_t)((uint64_t)who * who / LIVE); // some talk more than others
        if (!length[who] || length[who] + grow > MOST || kvd_rand(&rng) >> 40 < (1 << 24) / 8) {
            memcpy(path[who], system_prompt[(kvd_rand(&rng) >> 40) % SYSTEMS],
                   sizeof(system_prompt[0]));
            length[who] = 16;
        }
        for (; grow--; length[who]++)
            path[who][length[who]] = add_block(&t, path[who][length[who] - 1]);
        begin_request(&t);
        for (uint32_t i = 0; i < length[who]; i++)
            add_use(&t, path[who][i]);
        end_request(&t);
    }
    t.unique = t.n_blocks;
    return t;
}

// The trace with one-time prompts that have `share` as many blocks as it has itself.
static struct trace mix(const struct trace *from, double share, uint64_t seed)
{
    struct trace t = {.unique = from->unique};
    snprintf(t.name, sizeof(t.name), "%s", from->name);
    for (uint32_t b = 0; b < from->n_blocks; b++)
        add_block(&t, from->parent[b]);
    uint64_t rng = seed * 0x9e3779b97f4a7c15ull | 1;
    double owed = 0;
    for (uint32_t r = 0; r < from->n_requests; r++) {
        begin_request(&t);
        for (uint32_t i = from->begin[r]; i < from->begin[r + 1]; i++)
            add_use(&t, from->use[i]);
        end_request(&t);
        owed += (from->begin[r + 1] - from->begin[r]) * share;
        while (owed > 0) {
            uint32_t like = (uint32_t)(kvd_rand(&rng) >> 33) % from->n_requests;
            uint32_t n = from->begin[like + 1] - from->begin[like], parent = KVD_PREFIX_NONE;
            begin_request(&t);
            for (uint32_t i = 0; i < n; i++)
                add_use(&t, parent = add_block(&t, parent));
            end_request(&t);
            owed -= n + 1;
        }
    }
    find_next(&t);
    return t;
}

// -- what the policies to compare with share ----------------------------------------------------

struct block {
    bool there, pinned;
    uint8_t hits, queue;
    uint32_t children, version;
    uint64_t last, before, next; // uses, from 1; next: NEVER is the latest
    uint64_t turn;               // in its queue
};

struct candidate {
    uint64_t key; // the least goes first
    uint32_t block, version;
};

struct heap {
    struct candidate *x;
    size_t n, room;
};

struct cache {
    const struct trace *t;
    uint32_t room, used;
    struct block *block;
    struct heap heap[2]; // of leaves, by their queue; old ones are known by their version
    uint64_t (*key)(const struct block *b);
};

static void heap_push(struct heap *h, struct candidate x)
{
    if (h->n == h->room) {
        h->room = h->room ? h->room * 2 : 1 << 16;
        h->x = realloc(h->x, h->room * sizeof(*h->x));
        if (!h->x)
            abort();
    }
    size_t i = h->n++;
    for (; i && h->x[(i - 1) / 2].key > x.key; i = (i - 1) / 2)
        h->x[i] = h->x[(i - 1) / 2];
    h->x[i] = x;
}

static struct candidate heap_pop(struct heap *h)
{
    struct candidate top = h->x[0], x = h->x[--h->n];
    size_t i = 0;
    for (size_t k; (k = 2 * i + 1) < h->n; i = k) {
        if (k + 1 < h->n && h->x[k + 1].key < h->x[k].key)
            k++;
        if (x.key <= h->x[k].key)
            break;
        h->x[i] = h->x[k];
    }
    h->x[i] = x;
    return top;
}

static void offer(struct cache *c, uint32_t block)
{
    struct block *b = &c->block[block];
    if (b->there && !b->children && !b->pinned)
        heap_push(&c->heap[b->queue], (struct candidate){c->key(b), block, ++b->version});
}

static void leave(struct cache *c, uint32_t block)
{
    uint32_t parent = c->t->parent[block];
    c->block[block].there = false;
    c->used--;
    if (parent != KVD_PREFIX_NONE && --c->block[parent].children == 0)
        offer(c, parent);
}

// The first leaf of a queue, taken from its heap; KVD_PREFIX_NONE: there is none.
static uint32_t first_leaf(struct cache *c, int queue)
{
    while (c->heap[queue].n) {
        struct candidate x = heap_pop(&c->heap[queue]);
        const struct block *b = &c->block[x.block];
        if (b->there && !b->children && !b->pinned && b->version == x.version && b->queue == queue)
            return x.block;
    }
    return KVD_PREFIX_NONE;
}

// Evicts the first leaf, if it goes before `key`.
static bool evict_before(struct cache *c, uint64_t key)
{
    uint32_t block = first_leaf(c, 0);
    if (block == KVD_PREFIX_NONE)
        return false;
    if (c->key(&c->block[block]) < key) {
        leave(c, block);
        return true;
    }
    offer(c, block);
    return false;
}

static void enter(struct cache *c, uint32_t block)
{
    c->block[block].there = true;
    c->used++;
    if (c->t->parent[block] != KVD_PREFIX_NONE)
        c->block[c->t->parent[block]].children++;
}

static uint32_t run_of(const struct cache *c, const uint32_t *use, uint32_t n)
{
    uint32_t i = 0;
    while (i < n && c->block[use[i]].there)
        i++;
    return i;
}

// A policy that orders leaves by a key that only a use changes.
static double run_ordered(const struct trace *t, uint32_t room,
                          uint64_t (*key)(const struct block *b), bool knows_next)
{
    struct cache c = {.t = t, .room = room, .key = key};
    c.block = calloc(t->n_blocks, sizeof(*c.block));
    uint64_t found = 0;
    for (uint32_t r = 0; r < t->n_requests; r++) {
        uint32_t *use = t->use + t->begin[r], n = t->begin[r + 1] - t->begin[r], kept = 0;
        found += run_of(&c, use, n);
        for (uint32_t i = 0; i < n; i++) {
            struct block *b = &c.block[use[i]];
            b->before = b->last;
            b->last = r + 1;
            b->next = t->next[t->begin[r] + i];
            b->pinned = kept == i;
            if (kept < i || b->there) {
                kept += kept == i;
                continue;
            }
            if (c.used < room || evict_before(&c, knows_next ? key(b) : UINT64_MAX)) {
                enter(&c, use[i]);
                kept++;
            } else {
                b->pinned = false;
            }
        }
        for (uint32_t i = 0; i < kept; i++)
            c.block[use[i]].pinned = false;
        if (kept)
            offer(&c, use[kept - 1]);
    }
    free(c.block);
    free(c.heap[0].x);
    return (double)found / t->n_uses;
}

static uint64_t key_lru(const struct block *b)
{
    return b->last;
}
static uint64_t key_lru2(const struct block *b)
{
    return b->before << 32 | b->last;
}
static uint64_t key_optimum(const struct block *b)
{
    return NEVER - b->next;
}

static double run_lru(const struct trace *t, uint32_t room)
{
    return run_ordered(t, room, key_lru, false);
}
static double run_lru2(const struct trace *t, uint32_t room)
{
    return run_ordered(t, room, key_lru2, false);
}
static double run_optimum(const struct trace *t, uint32_t room)
{
    return run_ordered(t, room, key_optimum, true);
}

// -- S3-FIFO ------------------------------------------------------------------------------------

// Blocks stay at their place in a queue while they are no leaves.

enum { SMALL, MAIN };

struct s3 {
    struct cache c;
    uint32_t n[2];
    uint64_t turns;
    uint32_t *ghost_at; // by block: which ghost it was, from 1
    uint32_t ghosts;
};

static uint64_t key_turn(const struct block *b)
{
    return b->turn;
}

static void queue_add(struct s3 *s, uint32_t block, uint8_t queue)
{
    struct block *b = &s->c.block[block];
    b->queue = queue;
    b->turn = ++s->turns;
    s->n[queue]++;
    offer(&s->c, block);
}

static bool s3_evict(struct s3 *s)
{
    for (;;) {
        int queue = s->n[SMALL] > s->c.room / 10 ? SMALL : MAIN;
        uint32_t block = first_leaf(&s->c, queue);
        if (block == KVD_PREFIX_NONE)
            block = first_leaf(&s->c, queue = !queue);
        if (block == KVD_PREFIX_NONE)
            return false;
        struct block *b = &s->c.block[block];
        s->n[queue]--;
        if (b->hits) {
            b->hits = queue == SMALL ? 0 : b->hits - 1;
            queue_add(s, block, MAIN);
        } else {
            if (queue == SMALL)
                s->ghost_at[block] = ++s->ghosts;
            leave(&s->c, block);
            return true;
        }
    }
}

static double run_s3(const struct trace *t, uint32_t room)
{
    struct s3 s = {.c = {.t = t, .room = room, .key = key_turn}};
    s.c.block = calloc(t->n_blocks, sizeof(*s.c.block));
    s.ghost_at = calloc(t->n_blocks, sizeof(*s.ghost_at));
    uint64_t found = 0;
    for (uint32_t r = 0; r < t->n_requests; r++) {
        uint32_t *use = t->use + t->begin[r], n = t->begin[r + 1] - t->begin[r];
        uint32_t run = run_of(&s.c, use, n), kept = run;
        found += run;
        for (uint32_t i = 0; i < run; i++) {
            s.c.block[use[i]].hits = (uint8_t)KVD_MIN(s.c.block[use[i]].hits + 1, 3);
            s.c.block[use[i]].pinned = true;
        }
        for (; kept < n && (s.c.used < room || s3_evict(&s)); kept++) {
            uint32_t ghost = s.ghost_at[use[kept]];
            bool known = ghost && s.ghosts - ghost < room - room / 10;
            s.ghost_at[use[kept]] = 0;
            s.c.block[use[kept]].hits = 0;
            s.c.block[use[kept]].pinned = true;
            enter(&s.c, use[kept]);
            queue_add(&s, use[kept], known ? MAIN : SMALL);
        }
        for (uint32_t i = 0; i < kept; i++)
            s.c.block[use[i]].pinned = false;
        if (kept)
            offer(&s.c, use[kept - 1]);
    }
    free(s.c.block);
    free(s.ghost_at);
    free(s.c.heap[SMALL].x);
    free(s.c.heap[MAIN].x);
    return (double)found / t->n_uses;
}

// -- the index ----------------------------------------------------------------------------------

static double run_index(const struct trace *t, uint32_t room)
{
    struct kvd_prefix_config config = {room, 1, {0x9e3779b97f4a7c15, 0xd1b54a32d192ed03}};
    struct kvd_error err = {0};
    struct kvd_prefix *ix = kvd_prefix_new(&config, NULL, &err);
    struct kvd_prefix_key *keys = malloc(t->n_blocks * sizeof(*keys)), *path;
    path = malloc(t->n_uses * sizeof(*path));
    uint32_t *values = calloc(t->n_blocks, sizeof(*values)), domain, done;
    static const uint8_t digest[32] = "bench";
    if (!ix || kvd_prefix_domain(ix, digest, &domain, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    uint64_t rng = 88172645463325252ull, found = 0;
    for (uint32_t b = 0; b < t->n_blocks; b++)
        for (int w = 0; w < 3; w++)
            keys[b].w[w] = kvd_rand(&rng);
    for (uint32_t r = 0; r < t->n_requests; r++) {
        const uint32_t *use = t->use + t->begin[r];
        struct kvd_prefix_query q = {
            .domain = domain, .n = t->begin[r + 1] - t->begin[r], .keys = path};
        for (uint32_t i = 0; i < q.n; i++)
            path[i] = keys[use[i]];
        kvd_prefix_match(ix, &q, 1, 0);
        found += q.found;
        if (q.found)
            kvd_prefix_hold(ix, q.entry, NULL);
        struct kvd_prefix_info info;
        kvd_prefix_info(ix, &info);
        uint32_t want = q.n - q.found, free_entries = info.capacity - info.entries;
        if (want > free_entries)
            kvd_prefix_evict(ix, want - free_entries, KVD_PREFIX_EVICTED_INDEX, 1, NULL, NULL);
        kvd_prefix_insert(ix, domain, q.entry, path + q.found, values, want, NULL, &done, NULL);
        if (q.found)
            kvd_prefix_release(ix, q.entry);
    }
    if (kvd_prefix_verify(ix, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    kvd_prefix_free(&ix);
    free(keys);
    free(path);
    free(values);
    return (double)found / t->n_uses;
}

// -- the table ----------------------------------------------------------------------------------

enum { LRU, S3, LRU2, INDEX, OPTIMUM, POLICIES };
static double (*const run[POLICIES])(const struct trace *t, uint32_t room) = {
    run_lru, run_s3, run_lru2, run_index, run_optimum};

static void print_rows(const struct trace *from, double share, uint32_t seeds)
{
    static const int percent[] = {1, 3, 10, 30};
    double sum[KVD_LEN(percent)][POLICIES] = {0};
    if (share == 0)
        seeds = 1;
    for (uint32_t seed = 1; seed <= seeds; seed++) {
        struct trace t = mix(from, share, seed);
        for (size_t i = 0; i < KVD_LEN(percent); i++) {
            uint32_t room = (uint32_t)((uint64_t)t.unique * (uint32_t)percent[i] / 100);
            for (int p = 0; p < POLICIES; p++)
                sum[i][p] += run[p](&t, KVD_MAX(room, 1u)) * 100 / seeds;
        }
        trace_free(&t);
    }
    for (size_t i = 0; i < KVD_LEN(percent); i++) {
        const double *s = sum[i];
        double best = KVD_MAX(s[LRU], KVD_MAX(s[S3], s[LRU2]));
        printf("| %s + %.0f %% | %d %% | %.2f | %.2f | %.2f | %.2f | %.2f | %+.1f %% | %.0f %% |\n",
               from->name, share * 100, percent[i], s[LRU], s[S3], s[LRU2], s[INDEX], s[OPTIMUM],
               (s[INDEX] / best - 1) * 100, s[INDEX] / s[OPTIMUM] * 100);
        fflush(stdout);
    }
}

static void print_trace(struct trace *t, uint32_t seeds)
{
    static const double shares[] = {0, 0.25, 1};
    for (size_t i = 0; i < KVD_LEN(shares); i++)
        print_rows(t, shares[i], seeds);
    trace_free(t);
}

static int traces(const struct dirent *e)
{
    size_t n = strlen(e->d_name);
    return n > 7 && !strcmp(e->d_name + n - 7, ".txt.xz");
}

int main(int argc, char **argv)
{
    uint32_t seeds = 3, requests = 20000;
    bool quick = false;
    for (int o; (o = getopt(argc, argv, "s:q")) != -1;)
        if (o == 's')
            seeds = (uint32_t)atoi(optarg);
        else if (o == 'q')
            quick = true;
        else
            return 2;
    if (quick)
        seeds = 1, requests = 3000;
    printf("\n# blocks found, %% of those asked for; one-time prompts: mean of seeds 1 to %u\n",
           seeds);
    printf("| trace + one-time prompts | room, of its blocks | LRU | S3-FIFO | LRU-2 | kvd | "
           "optimum | "
           "kvd to best of three | kvd to optimum |\n|---|---|---|---|---|---|---|---|---|\n");
    struct dirent **found;
    int n = quick || optind == argc ? 0 : scandir(argv[optind], &found, traces, alphasort);
    for (int i = 0; i < n; i++) {
        struct trace t = read_trace(argv[optind], found[i]->d_name);
        print_trace(&t, seeds);
        free(found[i]);
    }
    if (n > 0)
        free(found);
    struct trace t = make_trace(requests, 1);
    print_trace(&t, seeds);
    return n < 0;
}

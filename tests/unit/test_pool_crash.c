// A pool whose process ends at any instant: its region opens, verifies, and has all that was true.
//
// Once behind each durable store of random operations, and amid what stands in for the kernels,
// with a copy of the region that is opened there; and once with a process that is killed at random,
// whose region the next one goes on with. Then with regions that are damaged. KVD_CRASH_OPS sets
// the number of operations.
#include "tests/unit/pool_planes.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

static uint64_t number(uint64_t otherwise)
{
    const char *env = getenv("KVD_CRASH_OPS");
    return env ? strtoull(env, NULL, 0) : otherwise;
}

static int attach(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    struct model *m = ctx;
    *addr = (uint64_t)(uintptr_t)(m->memory + index * bytes);
    return 0;
}
static int no_alloc(void *ctx, uint32_t index, uint64_t bytes, uint64_t *addr)
{
    (void)ctx;
    (void)index;
    (void)bytes;
    (void)addr;
    return KVD_E_FULL;
}
static void no_free(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    (void)ctx;
    (void)index;
    (void)addr;
    (void)bytes;
}

static int no_zero(void *ctx, uint32_t index, uint64_t addr, uint64_t bytes)
{
    (void)ctx;
    (void)index;
    (void)addr;
    (void)bytes;
    return KVD_E_FULL;
}

static void *shared(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    ck_assert(p != MAP_FAILED);
    return p;
}

static struct model *durable_model(const char *name)
{
    struct model *m = shared(sizeof(*m));
    m->memory = shared((size_t)EXTENTS * EXTENT);
    m->durable = true;
    m->doing.slot = -1;
    m->rng = kvd_test_seed(name);
    setup(m);
    return m;
}

// -- what must be there -------------------------------------------------------------------------

static bool one_of(uint64_t value, uint64_t a, uint64_t b)
{
    return value == a || value == b;
}

// A sequence of an operation that has not ended: as before it or as after it. An append that had
// been committed in some layers may be undone.
static void check_doing(const struct doing *d, const struct kvd_pool_seq_info *info)
{
    ck_assert_msg(one_of(info->length, d->length[0], d->length[1]), "length %llu, not %llu or %llu",
                  (unsigned long long)info->length, (unsigned long long)d->length[0],
                  (unsigned long long)d->length[1]);
    ck_assert(info->pending_layers == 0 ||
              (info->length == d->length[0] &&
               one_of(info->pending_layers, d->pending_layers[0], d->pending_layers[1])));
    ck_assert(one_of(info->holders, d->holders[0], d->holders[1]));
}

static void check_tokens(struct model *m, struct kvd_pool *opened, const struct model_seq *s,
                         const struct kvd_pool_seq_info *info)
{
    struct kvd_pool *pool = m->pool;
    m->pool = opened;
    for (uint32_t i = 0; i < m->shape[s->layout].n_layers; i++)
        check_layer(m, s, info, i);
    m->pool = pool;
}

// A name that goes from one to another is always somebody's.
static void check_name(const struct model *m, struct kvd_pool *opened, int i)
{
    const struct model_seq *s = &m->seq[i];
    const struct doing *d = &m->doing;
    if (s->name < 0 || (d->name_changes && i == d->slot))
        return;
    uint64_t owner = kvd_pool_lookup(opened, s->ns, name_of(s->name));
    ck_assert(owner == s->id || (i == d->other && owner && owner == m->seq[d->slot].id));
}

static void check_opened(struct model *m, struct kvd_pool *opened, bool all)
{
    const struct doing *d = &m->doing;
    for (int i = 0; i < LIVE; i++) {
        const struct model_seq *s = &m->seq[i];
        struct kvd_pool_seq_info info;
        bool doing = i == d->slot;
        if (!s->used || (doing && d->fresh))
            continue;
        if (kvd_pool_seq_info(opened, s->id, &info)) {
            ck_assert((doing && d->may_go) || (i == d->other && s->holders == 0));
            continue;
        }
        if (doing) {
            check_doing(d, &info);
        } else {
            ck_assert_uint_eq(info.length, s->length);
            ck_assert_uint_eq(info.pending_layers, s->pending_layers);
            ck_assert_uint_eq(info.holders, s->holders);
        }
        check_name(m, opened, i);
        if (doing || all)
            check_tokens(m, opened, s, &info);
    }
}

// -- a kill point behind each store -------------------------------------------------------------

void (*kvd_pool_kill_point)(void);
static struct model *looked_at;
static uint64_t points, looks;
static int copy = -1;

static void copy_region(const struct kvd_pool *pool)
{
    uint64_t bytes = pool->head->region_bytes;
    if (copy < 0)
        copy = memfd_create("copy", MFD_CLOEXEC);
    ck_assert_int_eq(ftruncate(copy, (off_t)bytes), 0);
    ck_assert_int_eq(pwrite(copy, pool->head, bytes, 0), (ssize_t)bytes);
}

static struct kvd_pool *open_copy(struct model *m, struct kvd_error *err)
{
    struct kvd_pool_mem_ops mem = {
        .ctx = m, .alloc = no_alloc, .free = no_free, .zero = no_zero, .attach = attach};
    struct kvd_pool_config config = config_of(m);
    config.on_evict = NULL;
    return kvd_pool_open(copy, &config, &mem, err);
}

static void look(void)
{
    struct model *m = looked_at;
    struct kvd_error err = {0};
    points += m != NULL;
    if (!m || kvd_rand(&m->rng) % 4)
        return;
    looked_at = NULL; // not at what opening stores
    copy_region(m->pool);
    struct kvd_pool *opened = open_copy(m, &err);
    ck_assert_msg(opened != NULL, "does not open: %s", err.text);
    check_opened(m, opened, ++looks % 16 == 0);
    kvd_pool_leave(&opened);
    looked_at = m;
}

static void storing(struct model *m)
{
    (void)m;
    look();
}

START_TEST(kill_points)
{
    struct model *m = durable_model("kill_points");
    m->storing = storing;
    kvd_pool_kill_point = look;
    uint64_t n = number(400);
    for (uint64_t i = 0; i < n || ((looks <= 100 || !m->appended || !m->evicted) && i < 20 * n);
         i++) {
        struct kvd_pool_evicted gone;
        looked_at = m;
        if (i >= n) // chance has left it out
            kvd_pool_evict(m->pool, KVD_POOL_NONE, 0, 1, &gone);
        model_step(m);
        m->doing.slot = -1;
        looked_at = NULL;
        if (i % 50 == 0)
            check_all(m);
    }
    printf("%llu kill points, %llu opened\n", (unsigned long long)points,
           (unsigned long long)looks);
    ck_assert(looks > 100 && m->appended && m->evicted);
    kvd_pool_free(&m->pool);
}
END_TEST

// Parts of pages, which are outgrown and settled more often than chance would have it.
START_TEST(parts_of_pages)
{
    static void (*const ops[])(struct model *) = {op_new,  op_append,   op_append, op_settle,
                                                  op_fork, op_truncate, op_release};
    struct model *m = durable_model("parts_of_pages");
    m->storing = storing;
    kvd_pool_kill_point = look;
    for (int i = 0; i < 20000 && (m->settled < 8 || m->grown < 8); i++) {
        looked_at = m;
        ops[below(m, KVD_LEN(ops))](m);
        m->doing.slot = -1;
        looked_at = NULL;
    }
    check_all(m);
    ck_assert(m->settled >= 8 && m->grown >= 8);
    kvd_pool_free(&m->pool);
}
END_TEST

// -- processes that are killed ------------------------------------------------------------------

static void child(struct model *m)
{
    // What Check is told goes to a file that the parent shares, and must not end half written.
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    for (int fd = 3; fd < 64; fd++)
        dup2(null, fd);
    for (;;) {
        model_step(m);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
        m->doing.slot = -1;
        m->doing.other = -1;
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    }
}

struct found {
    uint64_t id[2 * MAX_SEQUENCES];
    uint32_t n, holders[2 * MAX_SEQUENCES];
};

static bool find(void *ctx, const struct kvd_pool_seq_info *info)
{
    struct found *f = ctx;
    f->id[f->n] = info->id;
    f->holders[f->n++] = info->holders;
    return true;
}

// The model goes on from what was found. What it knows nothing of is freed.
static void take_over(struct model *m)
{
    struct found f = {.n = 0};
    kvd_pool_seq_each(m->pool, find, &f);
    for (int i = 0; i < LIVE; i++) {
        struct model_seq *s = &m->seq[i];
        struct kvd_pool_seq_info info;
        if (i == m->doing.slot && m->doing.fresh)
            s->used = false;
        if (!s->used)
            continue;
        s->used = kvd_pool_seq_info(m->pool, s->id, &info) == 0;
        if (!s->used)
            continue;
        s->length = info.length;
        s->pending_layers = info.pending_layers;
        s->pending = (uint32_t)(info.pending_length - info.length);
        s->holders = info.holders;
        s->name = -1;
        for (int n = 0; n < NAMES && info.name[0]; n++)
            if (strcmp(info.name, name_of(n)) == 0)
                s->name = n;
        for (uint32_t j = 0; j < f.n; j++)
            f.id[j] = f.id[j] == s->id ? 0 : f.id[j];
    }
    for (uint32_t j = 0; j < f.n; j++) {
        if (f.id[j])
            kvd_pool_unpublish(m->pool, f.id[j]);
        for (uint32_t h = 0; f.id[j] && h < f.holders[j]; h++)
            kvd_pool_seq_release(m->pool, f.id[j]);
    }
}

START_TEST(killed_processes)
{
    struct model *m = durable_model("killed_processes");
    struct kvd_pool_mem_ops mem = {
        .ctx = m, .alloc = mem_alloc, .free = mem_free, .zero = mem_zero, .attach = attach};
    uint64_t amid = 0, n = number(400) / 5, i = 0;
    // On a busy machine a child may need long before it does anything.
    for (; i < n || ((amid == 0 || m->appended == 0) && i < 10 * n); i++) {
        struct kvd_pool_config config = config_of(m);
        struct kvd_error err = {0};
        pid_t pid = fork();
        if (pid == 0)
            child(m);
        ck_assert_int_gt(pid, 0);
        nanosleep(&(struct timespec){.tv_nsec = (long)below(m, 4000000 * (uint32_t)(1 + i / n))},
                  NULL);
        kill(pid, SIGKILL);
        int status;
        ck_assert_int_eq(waitpid(pid, &status, 0), pid);
        ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        struct kvd_pool *opened = kvd_pool_open(kvd_pool_fd(m->pool), &config, &mem, &err);
        ck_assert_msg(opened != NULL, "after %llu: %s", (unsigned long long)i, err.text);
        check_opened(m, opened, true);
        amid += m->doing.slot >= 0;
        kvd_pool_leave(&m->pool);
        m->pool = opened;
        hold_names(m);
        take_over(m);
        m->doing.slot = m->doing.other = -1;
        check_all(m);
    }
    printf("%llu processes killed, %llu amid an operation\n", (unsigned long long)i,
           (unsigned long long)amid);
    ck_assert(amid > 0 && m->appended > 0);
    kvd_pool_free(&m->pool);
}
END_TEST

// -- damage -------------------------------------------------------------------------------------

// What opens can be used: all it has is read, and freed.
static void use(struct model *m, struct kvd_pool *opened)
{
    struct found *f = calloc(1, sizeof(*f));
    struct kvd_error err = {0};
    kvd_pool_seq_each(opened, find, f);
    for (uint32_t i = 0; i < f->n; i++) {
        struct kvd_pool_seq_info info;
        struct kvd_pool_evicted freed;
        if (kvd_pool_seq_info(opened, f->id[i], &info))
            continue; // evicted
        struct kvd_pool_append_request by = {.seq = f->id[i],
                                             .position = info.length,
                                             .tokens = 1 + below(m, 300),
                                             .layer_count = 1};
        struct kvd_pool_append a;
        if (kvd_pool_append_begin(opened, &by, &a, &err) == 0)
            kvd_pool_append_abort(opened, &a);
        kvd_pool_truncate(opened, f->id[i], info.length / 2, &err);
        kvd_pool_unpublish(opened, f->id[i]);
        for (uint32_t h = 0; h < KVD_MIN(f->holders[i], 8u); h++)
            kvd_pool_seq_release(opened, f->id[i]);
        kvd_pool_evict(opened, KVD_POOL_NONE, 0, 1, &freed);
    }
    ck_assert_msg(kvd_pool_verify(opened, &err) == 0, "%s", err.text);
    free(f);
}

static void damage(struct model *m, uint64_t at, uint64_t bytes)
{
    uint8_t byte;
    ck_assert_int_eq(pread(copy, &byte, 1, (off_t)(at % bytes)), 1);
    byte ^= (uint8_t)(below(m, 2) ? 1u << below(m, 8) : 1 + below(m, 255));
    ck_assert_int_eq(pwrite(copy, &byte, 1, (off_t)(at % bytes)), 1);
}

// A place that counts: most of a region is empty.
static uint64_t place(struct model *m)
{
    const struct kvd_pool *p = m->pool;
    const uint8_t *base = (const uint8_t *)p->head;
    const struct {
        const void *table;
        uint64_t bytes;
    } tables[] = {{p->head, 128},
                  {p->journal, sizeof(*p->journal)},
                  {p->ns, sizeof(*p->ns) * SPACES},
                  {p->layout, sizeof(*p->layout) * LAYOUTS},
                  {p->slab, sizeof(*p->slab) * p->head->n_slabs},
                  {p->extent, sizeof(*p->extent) * EXTENTS},
                  {p->seq, sizeof(*p->seq) * p->head->n_sequences_ever},
                  {p->seq, sizeof(*p->seq) * p->head->n_sequences_ever},
                  {p->block, sizeof(*p->block) * p->head->n_blocks_ever}};
    uint32_t t = below(m, KVD_LEN(tables));
    return (uint64_t)((const uint8_t *)tables[t].table - base) +
           kvd_rand(&m->rng) % KVD_MAX(tables[t].bytes, 1ul);
}

START_TEST(damaged_regions)
{
    struct model *m = durable_model("damaged_regions");
    uint64_t opens = 0, refused = 0;
    for (uint64_t i = 0, n = number(400) * 4; i < n; i++) {
        struct kvd_error err = {0};
        model_step(m);
        copy_region(m->pool);
        for (uint32_t j = 1 + below(m, 3); j > 0; j--)
            damage(m, place(m), m->pool->head->region_bytes);
        struct kvd_pool *opened = open_copy(m, &err);
        opens += opened != NULL;
        refused += opened == NULL;
        ck_assert(opened || err.text[0]);
        if (opened)
            use(m, opened);
        kvd_pool_leave(&opened);
    }
    printf("%llu damaged regions opened, %llu refused\n", (unsigned long long)opens,
           (unsigned long long)refused);
    ck_assert(opens && refused);
    kvd_pool_free(&m->pool);
}
END_TEST

static int refusal(struct model *m, struct kvd_error *err)
{
    struct kvd_pool *opened = open_copy(m, err);
    ck_assert(!opened);
    return err->code;
}

START_TEST(refusals)
{
    struct model *m = durable_model("refusals");
    struct kvd_error err = {0};
    uint32_t version = KVD_POOL_VERSION + 1;
    copy_region(m->pool);
    ck_assert_int_eq(pwrite(copy, &version, sizeof(version), offsetof(struct region_head, version)),
                     sizeof(version));
    ck_assert_int_eq(refusal(m, &err), KVD_E_UNSUPPORTED);
    char theirs[32], ours[32];
    snprintf(theirs, sizeof(theirs), "version %u", version);
    snprintf(ours, sizeof(ours), "reads version %u", KVD_POOL_VERSION);
    ck_assert(strstr(err.text, theirs) && strstr(err.text, ours));
    copy_region(m->pool);
    ck_assert_int_eq(ftruncate(copy, 4096), 0);
    ck_assert_int_eq(refusal(m, &err), KVD_E_INVALID);
    copy_region(m->pool);
    ck_assert_int_eq(ftruncate(copy, 1 << 20), 0);
    ck_assert_int_eq(refusal(m, &err), KVD_E_CORRUPT);
    copy_region(m->pool);
    struct kvd_pool_mem_ops mem = {.ctx = m, .alloc = no_alloc, .free = no_free, .attach = attach};
    struct kvd_pool_config config = config_of(m);
    config.max_sequences++;
    ck_assert(!kvd_pool_open(copy, &config, &mem, &err));
    ck_assert_int_eq(err.code, KVD_E_PRECONDITION);
    ck_assert(strstr(err.text, "40 sequences"));
    kvd_pool_free(&m->pool);
}
END_TEST

KVD_MAIN("pool_crash", 600, kill_points, parts_of_pages, killed_processes, damaged_regions,
         refusals)

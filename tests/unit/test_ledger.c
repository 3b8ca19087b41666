// The ledger of sessions, whose process ends at any instant: what is opened there says what was
// before an operation or what is after it, and a reply is remembered if and only if its call is
// true. Then ledgers that are damaged. KVD_CRASH_OPS sets the number of operations.
#include "daemon/session/ledger.h"
#include "tests/unit/suite.h"

#include <sys/mman.h>
#include <sys/stat.h>

enum { SESSIONS = 4, SEQUENCES = 12, ROOM = 30, REPLY = 3000 };

// What a session is to have.
struct state {
    uint64_t id, generation; // id 0: there is none
    uint32_t holds[SEQUENCES];
    uint64_t request; // the latest that is remembered
};

static struct kvd_ledger *l;
static struct state before[SESSIONS], after[SESSIONS];
static uint32_t record[SESSIONS], hold[SESSIONS][SEQUENCES];
static uint64_t points, rng, next_request, freeing;
static uint8_t reply[REPLY];

void (*kvd_ledger_kill_point)(void);

// What an opened ledger says.
static void read_state(const struct kvd_ledger *from, uint64_t id, uint64_t request,
                       struct state *out)
{
    uint32_t of = KVD_LEDGER_NONE;
    *out = (struct state){0};
    for (uint32_t i = 0; i < kvd_ledger_sessions(from); i++) {
        const struct kvd_ledger_session *s = kvd_ledger_session(from, i);
        if (!s || s->id != id)
            continue;
        of = i;
        out->id = id;
        out->generation = s->generation;
    }
    for (uint32_t i = 0; i < kvd_ledger_holds(from) && of != KVD_LEDGER_NONE; i++) {
        uint32_t session;
        uint64_t seq, n = kvd_ledger_held(from, i, &session, &seq);
        if (n && session == of) {
            ck_assert_uint_lt(seq, SEQUENCES);
            ck_assert_uint_eq(out->holds[seq], 0);
            out->holds[seq] = (uint32_t)n;
        }
    }
    uint64_t method;
    size_t length;
    void *data = of != KVD_LEDGER_NONE && request
                     ? kvd_ledger_recall(from, of, request, &method, &length)
                     : NULL;
    out->request = data ? request : 0;
    if (data)
        ck_assert_mem_eq(data, reply, length);
    free(data);
}

static bool same(const struct state *a, const struct state *b, bool partly)
{
    if (a->id != b->id || a->generation != b->generation || a->request != b->request)
        return false;
    return partly || memcmp(a->holds, b->holds, sizeof(a->holds)) == 0;
}

// A ledger in a copy of the memory.
static struct kvd_ledger *copy(struct kvd_error *err)
{
    struct stat st;
    ck_assert_int_eq(fstat(kvd_ledger_fd(l), &st), 0);
    int fd = memfd_create("copy", MFD_CLOEXEC);
    void *from = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, kvd_ledger_fd(l), 0);
    ck_assert(from != MAP_FAILED);
    ck_assert_int_eq(write(fd, from, (size_t)st.st_size), st.st_size);
    munmap(from, (size_t)st.st_size);
    struct kvd_ledger *made = kvd_ledger_open(fd, SESSIONS, ROOM, err);
    close(fd);
    return made;
}

// The process ends here.
static void look(void)
{
    struct kvd_error err = {0};
    kvd_ledger_kill_point = NULL; // not within opening
    struct kvd_ledger *was = copy(&err);
    ck_assert_msg(was != NULL, "%s", err.text);
    for (uint32_t i = 0; i < SESSIONS; i++) {
        uint64_t id = after[i].id ? after[i].id : before[i].id;
        struct state now;
        read_state(was, id, after[i].request != before[i].request ? after[i].request : 0, &now);
        struct state old = before[i], new = after[i];
        if (new.request == old.request)
            new.request = 0;
        old.request = 0;
        // Some of what a call frees may be free; each once.
        bool partly = freeing && kvd_ledger_freeing(was, record[i], freeing);
        ck_assert_msg(same(&now, &old, partly) || same(&now, &new, false), "session %u", i);
        for (uint32_t s = 0; partly && s < SEQUENCES; s++)
            ck_assert(now.holds[s] == old.holds[s] || now.holds[s] == new.holds[s]);
    }
    kvd_ledger_close(&was);
    points++;
    kvd_ledger_kill_point = look;
}

static uint64_t pick(uint64_t n)
{
    return kvd_rand(&rng) % n;
}

static void open_one(uint32_t i)
{
    struct kvd_ledger_session s = {.id = kvd_ledger_next_id(l),
                                   .appender = 1,
                                   .generation = 1,
                                   .secret = "0123456789abcdef0123456789abcdef",
                                   .ns = "n"};
    after[i] = (struct state){.id = s.id, .generation = 1};
    memset(hold[i], 0xff, sizeof(hold[i]));
    record[i] = kvd_ledger_add(l, &s);
    ck_assert_uint_ne(record[i], KVD_LEDGER_NONE);
}

static void close_one(uint32_t i)
{
    after[i] = (struct state){0};
    kvd_ledger_drop(l, record[i]);
    before[i] = after[i];
    for (uint32_t s = 0; s < SEQUENCES; s++)
        if (hold[i][s] != KVD_LEDGER_NONE)
            kvd_ledger_forget(l, hold[i][s]);
}

static void take(uint32_t i, uint32_t seq)
{
    hold[i][seq] = kvd_ledger_hold(l, record[i], hold[i][seq], seq);
    ck_assert_uint_ne(hold[i][seq], KVD_LEDGER_NONE);
}

static void give(uint32_t i, uint32_t seq, uint32_t n, uint32_t of, uint64_t request)
{
    kvd_ledger_release(l, hold[i][seq], n, request);
    if (n == of)
        hold[i][seq] = KVD_LEDGER_NONE;
}

// A call that makes some, which succeeds or is undone.
static void make(uint32_t i)
{
    uint32_t first = (uint32_t)pick(SEQUENCES), n = 1 + (uint32_t)pick(3);
    bool fails = pick(4) == 0;
    uint32_t room = 0;
    for (uint32_t s = 0; s < SESSIONS; s++)
        for (uint32_t q = 0; q < SEQUENCES; q++)
            room += hold[s][q] != KVD_LEDGER_NONE && before[s].id;
    if (room + n > ROOM)
        return;
    if (!fails) {
        for (uint32_t k = 0; k < n; k++)
            after[i].holds[(first + k) % SEQUENCES]++;
        after[i].request = ++next_request;
    }
    for (uint32_t k = 0; k < n; k++)
        take(i, (first + k) % SEQUENCES);
    if (fails) {
        for (uint32_t k = 0; k < n; k++) {
            uint32_t seq = (first + k) % SEQUENCES;
            give(i, seq, 1, before[i].holds[seq] + 1, 0);
        }
        return;
    }
    kvd_ledger_remember(l, record[i], after[i].request, 7, reply, pick(REPLY));
}

static void release_some(uint32_t i)
{
    // Ids that differ in what holds remember of them, and ids that do not.
    next_request++;
    freeing = after[i].request = pick(2) ? next_request : next_request << 32 | 0xfffffff0;
    uint32_t n[SEQUENCES];
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        n[s] = pick(3) == 0 && before[i].holds[s] ? 1 + (uint32_t)pick(before[i].holds[s]) : 0;
        after[i].holds[s] -= n[s];
        if (n[s] && kvd_ledger_released_by(l, hold[i][s], freeing))
            kvd_ledger_release(l, hold[i][s], 0, 0);
    }
    ck_assert(kvd_ledger_freeing_begin(l, record[i], freeing));
    for (uint32_t s = 0; s < SEQUENCES; s++) {
        if (!n[s])
            continue;
        ck_assert(!kvd_ledger_released_by(l, hold[i][s], freeing));
        give(i, s, n[s], before[i].holds[s], freeing);
        ck_assert(hold[i][s] == KVD_LEDGER_NONE || kvd_ledger_released_by(l, hold[i][s], freeing));
    }
    kvd_ledger_remember(l, record[i], freeing, 7, reply, 0);
    ck_assert(!kvd_ledger_freeing(l, record[i], freeing));
    freeing = 0;
}

static void operate(void)
{
    uint32_t i = (uint32_t)pick(SESSIONS);
    memcpy(after, before, sizeof(after));
    if (!before[i].id) {
        open_one(i);
    } else if (pick(20) == 0) {
        close_one(i);
    } else if (pick(10) == 0) {
        after[i].generation++;
        kvd_ledger_resumed(l, record[i], 5);
    } else if (pick(3) == 0) {
        release_some(i);
    } else {
        make(i);
    }
    memcpy(before, after, sizeof(before));
}

static void begin(void)
{
    struct kvd_error err = {0};
    rng = kvd_test_seed("ledger");
    memset(before, 0, sizeof(before));
    memset(hold, 0xff, sizeof(hold));
    for (uint32_t i = 0; i < REPLY; i++)
        reply[i] = (uint8_t)pick(256);
    l = kvd_ledger_new(SESSIONS, ROOM, &err);
    ck_assert_ptr_nonnull(l);
}

static uint64_t operations(uint64_t otherwise)
{
    const char *env = getenv("KVD_CRASH_OPS");
    return env ? strtoull(env, NULL, 0) : otherwise;
}

START_TEST(a_ledger_is_whole_at_any_instant)
{
    begin();
    memcpy(after, before, sizeof(after));
    kvd_ledger_kill_point = look;
    for (uint64_t i = 0; i < operations(300); i++)
        operate();
    kvd_ledger_kill_point = NULL;
    printf("%llu instants\n", (unsigned long long)points);
    struct kvd_error err = {0};
    ck_assert_ptr_null(kvd_ledger_open(kvd_ledger_fd(l), SESSIONS + 1, ROOM, &err));
    ck_assert_int_eq(err.code, KVD_E_PRECONDITION);
    kvd_ledger_close(&l);
}
END_TEST

// It is refused, or opens and can be used.
START_TEST(a_damaged_ledger_is_refused_or_good)
{
    begin();
    uint32_t opened = 0;
    for (uint64_t i = 0; i < operations(2000); i++) {
        struct kvd_error err = {0};
        for (uint32_t k = 0; k < 3; k++)
            operate();
        struct kvd_ledger *good = l;
        struct kvd_ledger *spoiled = copy(&err);
        ck_assert_ptr_nonnull(spoiled);
        struct stat st;
        fstat(kvd_ledger_fd(spoiled), &st);
        uint64_t at = pick(2)
                          ? pick((uint64_t)st.st_size)
                          : 4096 + pick(SESSIONS) * (uint64_t)(st.st_size / SESSIONS) + pick(512),
                 garbage = kvd_rand(&rng);
        ck_assert_int_gt(pwrite(kvd_ledger_fd(spoiled), &garbage, 1 + pick(8), (off_t)at), 0);
        l = spoiled;
        struct kvd_ledger *now = copy(&err);
        l = good;
        kvd_ledger_close(&spoiled);
        for (uint32_t s = 0; now && s < kvd_ledger_sessions(now); s++) {
            uint64_t method;
            size_t length;
            if (!kvd_ledger_session(now, s))
                continue;
            for (uint64_t r = 1; r < 10; r++)
                free(kvd_ledger_recall(now, s, next_request - r, &method, &length));
            kvd_ledger_remember(now, s, 99, 1, reply, REPLY);
        }
        opened += now != NULL;
        kvd_ledger_close(&now);
    }
    ck_assert_uint_gt(opened, 0);
    kvd_ledger_close(&l);
}
END_TEST

START_TEST(ids_that_are_alike_are_two)
{
    const uint64_t ids[] = {1ull << 32 | 7, 2ull << 32 | 7, 7ull << 32, 8ull << 32, 7};
    begin();
    open_one(0);
    uint32_t one = KVD_LEDGER_NONE, session;
    uint64_t seq;
    for (uint32_t i = 0; i < 7; i++)
        one = kvd_ledger_hold(l, record[0], one, 5);
    kvd_ledger_commit(l, record[0]);
    for (uint32_t i = 0; i < KVD_LEN(ids); i++) {
        ck_assert(!kvd_ledger_freeing(l, record[0], ids[i]));
        kvd_ledger_release(l, one, 0, 0);
        ck_assert(!kvd_ledger_released_by(l, one, ids[i]));
        ck_assert(kvd_ledger_freeing_begin(l, record[0], ids[i]));
        kvd_ledger_release(l, one, 1, ids[i]);
        // The one that takes over here finds that it has been done.
        struct kvd_error err = {0};
        struct kvd_ledger *next = copy(&err);
        ck_assert(kvd_ledger_freeing(next, record[0], ids[i]));
        ck_assert(kvd_ledger_released_by(next, one, ids[i]));
        ck_assert_uint_eq(kvd_ledger_held(next, one, &session, &seq), 6 - i);
        kvd_ledger_close(&next);
        kvd_ledger_remember(l, record[0], ids[i], 7, reply, 0);
    }
    kvd_ledger_close(&l);
}
END_TEST

START_TEST(what_does_not_fit_is_refused)
{
    begin();
    before[0] = (struct state){0};
    open_one(0);
    uint32_t one = KVD_LEDGER_NONE;
    for (uint32_t i = 0; i < KVD_LEDGER_MOST_HOLDS; i++)
        one = kvd_ledger_hold(l, record[0], one, 5);
    ck_assert_uint_ne(one, KVD_LEDGER_NONE);
    ck_assert_uint_eq(kvd_ledger_hold(l, record[0], one, 5), KVD_LEDGER_NONE);
    for (uint32_t i = 1; i < ROOM; i++)
        ck_assert_uint_ne(kvd_ledger_hold(l, record[0], KVD_LEDGER_NONE, i), KVD_LEDGER_NONE);
    ck_assert_uint_eq(kvd_ledger_hold(l, record[0], KVD_LEDGER_NONE, 77), KVD_LEDGER_NONE);
    for (uint64_t r = 1; r <= KVD_LEDGER_FREEING; r++)
        ck_assert(kvd_ledger_freeing_begin(l, record[0], r));
    ck_assert(!kvd_ledger_freeing_begin(l, record[0], 99));
    ck_assert(kvd_ledger_freeing_begin(l, record[0], 1));
    // Two whose holds would say the same of them do not free at once.
    kvd_ledger_remember(l, record[0], 2, 1, reply, 0);
    ck_assert(!kvd_ledger_freeing_begin(l, record[0], 1ull << 32 | 3));
    ck_assert(!kvd_ledger_freeing_begin(l, record[0], 4ull << 32));
    ck_assert(kvd_ledger_freeing_begin(l, record[0], 1ull << 32 | 2));
    static uint8_t large[KVD_LEDGER_REPLIES];
    uint64_t method;
    size_t length;
    kvd_ledger_remember(l, record[0], 50, 1, large, sizeof(large)); // not with its head
    ck_assert_ptr_null(kvd_ledger_recall(l, record[0], 50, &method, &length));
    kvd_ledger_close(&l);
}
END_TEST

KVD_MAIN("ledger", 120, a_ledger_is_whole_at_any_instant, a_damaged_ledger_is_refused_or_good,
         ids_that_are_alike_are_two, what_does_not_fit_is_refused)

// Buffers of many segments: what a call may say, what it is charged for, and that one that is
// refused has changed nothing, wherever it fails. The backend and the shares are played here.
#include "daemon/rpc/users.h"
#include "daemon/session/buffer.h"
#include "daemon/session/reclaim.h"
#include "tests/unit/suite.h"

enum { MOST = KVD_MAX_CALL_SEGMENTS, KEYS = 4 };
#define UNIT  ((uint64_t)KVD_SEGMENT_UNIT)
#define TOTAL (UNIT * 1000)

static struct kvd_daemon d;
static struct kvd_session s;
static uint64_t taken[KVD_SHARE_COUNT];
static uint64_t reserved, mapped; // bytes that the backend has
static int takes, refuses;        // takes of shares; the one that is refused
static uint32_t bad_segment;      // the descriptor that the driver refuses
static bool later;                // memory is not let go of before the test says so
static struct kvd_reclaim *waits; // what then waits for that
static uint32_t gone;             // how often it was told that a buffer is unmapped

// -- the daemon around it -----------------------------------------------------------------------

void kvd_reclaim_mapping(struct kvd_daemon *daemon, void *data, uint64_t size)
{
    (void)daemon, (void)data, (void)size;
    ck_abort();
}

void kvd_reclaim_begin(struct kvd_daemon *daemon, struct kvd_reclaim *r)
{
    ck_assert(daemon == &d && !(later && waits));
    if (later) {
        waits = r;
        return;
    }
    r->let_go(r);
    r->done(r);
}

struct kvd_user *kvd_user_ref(struct kvd_daemon *daemon, int64_t uid)
{
    (void)uid;
    return (struct kvd_user *)daemon;
}

void kvd_user_unref(struct kvd_user **user)
{
    *user = NULL;
}

uint64_t kvd_share_total(const struct kvd_daemon *daemon, enum kvd_share share)
{
    (void)daemon;
    return share == KVD_SHARE_SEGMENT_BYTES ? TOTAL : UINT64_MAX;
}

void kvd_share_possible(struct kvd_daemon *daemon, enum kvd_share share, uint64_t possible)
{
    (void)daemon, (void)share, (void)possible;
}

int kvd_user_take(struct kvd_user *user, enum kvd_share share, uint64_t n, struct kvd_error *err)
{
    (void)user;
    if (++takes == refuses || (share == KVD_SHARE_SEGMENT_BYTES && taken[share] + n > TOTAL))
        return kvd_fail(err, KVD_E_LIMIT, "too many");
    taken[share] += n;
    return KVD_OK;
}

void kvd_user_give(struct kvd_user *user, enum kvd_share share, uint64_t n)
{
    (void)user;
    ck_assert(taken[share] >= n);
    taken[share] -= n;
}

static int fake_reserve(struct kvd_backend *b, uint64_t size, uint8_t **data, struct kvd_error *err)
{
    (void)b;
    if (++takes == refuses)
        return kvd_fail(err, KVD_E_FULL, "no addresses");
    reserved += size;
    *data = (uint8_t *)UNIT;
    return KVD_OK;
}

static int fake_map(struct kvd_backend *b, uint8_t *at, const struct kvd_segment *segments,
                    uint32_t n, struct kvd_error *err)
{
    (void)b;
    uint64_t bytes = 0;
    ck_assert((uintptr_t)at % UNIT == 0 && n >= 1 && n <= MOST);
    for (uint32_t i = 0; i < n; i++) {
        if (segments[i].fd == (int)bad_segment)
            return kvd_fail(err, KVD_E_INVALID, "segments[%u] is bad", i);
        ck_assert(segments[i].bytes && segments[i].bytes % UNIT == 0);
        bytes += segments[i].bytes;
    }
    mapped += bytes;
    return KVD_OK;
}

static void fake_unmap(struct kvd_backend *b, uint8_t *data, uint64_t has, uint64_t size)
{
    (void)b;
    ck_assert(data && has <= mapped && size <= reserved && has <= size);
    mapped -= has;
    reserved -= size;
}

static const struct kvd_backend_ops ops = {
    .segments_reserve = fake_reserve, .segments_map = fake_map, .segments_unmap = fake_unmap};
static struct kvd_backend backend = {.ops = &ops};

static void begin(void)
{
    d.backend = &backend;
    refuses = 0;
    bad_segment = UINT32_MAX;
}

// What there is, counted anew, is what is charged and what the backend has.
static uint32_t check_all(void)
{
    uint64_t count = 0, bytes = 0, has = 0, segments = 0;
    struct kvd_buffer *b, *next;
    HASH_ITER(hh, s.buffers, b, next)
    {
        count++;
        bytes += b->size;
        has += b->mapped;
        segments += b->segments;
        ck_assert(b->mapped > 0 && b->mapped <= b->size && b->refs == 1);
        ck_assert((kvd_session_buffer(&s, b->id) == b) == (b->mapped == b->size));
        ck_assert(kvd_session_any_buffer(&s, b->id) == b);
    }
    ck_assert_uint_eq(taken[KVD_SHARE_MAPPINGS], count + segments);
    ck_assert_uint_eq(taken[KVD_SHARE_SEGMENT_BYTES], bytes);
    ck_assert_uint_eq(taken[KVD_SHARE_BUFFER_BYTES], 0);
    ck_assert_uint_eq(reserved, bytes);
    ck_assert_uint_eq(mapped, has);
    ck_assert_uint_eq(s.buffer_bytes, bytes);
    ck_assert_uint_eq(s.counted_bytes, 0);
    return (uint32_t)count;
}

static void drop_all(void)
{
    struct kvd_buffer *b, *next;
    HASH_ITER(hh, s.buffers, b, next)
    kvd_session_drop_buffer(&s, b);
    ck_assert_uint_eq(check_all(), 0);
}

static int add(uint64_t key, uint64_t size, uint64_t before, const struct kvd_segment *segments,
               uint32_t n, struct kvd_buffer **out, struct kvd_error *err)
{
    const struct kvd_segments m = {size, before, segments, n};
    *err = (struct kvd_error){0};
    takes = 0;
    return kvd_session_add_segments(&d, &s, key, 0, &m, out, err);
}

// -- tests --------------------------------------------------------------------------------------

START_TEST(parts_make_one_buffer)
{
    const struct kvd_segment two[] = {{1, UNIT}, {2, 3 * UNIT}}, one = {3, UNIT};
    struct kvd_error err;
    struct kvd_buffer *b, *again;
    begin();
    ck_assert_int_eq(add(7, 5 * UNIT, 0, two, 2, &b, &err), KVD_OK);
    ck_assert(!kvd_session_buffer(&s, b->id) && b->mapped == 4 * UNIT && b->segments == 2);
    ck_assert_int_eq(add(7, 5 * UNIT, 0, two, 2, &again, &err), KVD_OK); // a reply was lost
    ck_assert(again == b && b->segments == 2);
    ck_assert_int_eq(add(7, 5 * UNIT, 4 * UNIT, &one, 1, &again, &err), KVD_OK);
    ck_assert(again == b && kvd_session_buffer(&s, b->id) == b);
    ck_assert_int_eq(add(7, 6 * UNIT, 0, &one, 1, &again, &err), KVD_OK); // another size: another
    ck_assert(again != b && check_all() == 2);
    drop_all();
}
END_TEST

START_TEST(what_is_wrong_is_named)
{
    static const struct {
        uint64_t size, before, bytes[2];
        const char *text;
    } wrong[] = {
        {0, 0, {UNIT, UNIT}, "segments[0] has 2097152 bytes, and only 0"},
        {UNIT + 1, 0, {UNIT, UNIT}, "size is 2097153, not a multiple"},
        {UINT64_MAX, 0, {UNIT, UNIT}, "not a multiple"},
        {4 * UNIT, 5 * UNIT, {UNIT, UNIT}, "mapped is 10485760, size 8388608"},
        {4 * UNIT, UINT64_MAX, {UNIT, UNIT}, "mapped is"},
        {4 * UNIT, 0, {UNIT, 0}, "segments[1] has 0 bytes"},
        {4 * UNIT, 0, {UNIT, UNIT - 1}, "segments[1] has 2097151 bytes"},
        {4 * UNIT, 0, {UNIT, 4 * UNIT}, "segments[1] has 8388608 bytes, and only 6291456"},
        {4 * UNIT, 0, {5 * UNIT, UNIT}, "segments[0] has"},
        {4 * UNIT, 0, {2 * UNIT, -UNIT}, "segments[1] has"}, // the sum is right, modulo 2^64
        {4 * UNIT, 0, {-UNIT, 2 * UNIT}, "segments[0] has"},
        {4 * UNIT, UNIT, {UNIT, UNIT}, "segments that follow 2097152 bytes of a buffer that has 0"},
        {TOTAL + UNIT, 0, {UNIT, UNIT}, "so many"},
        {-UNIT, 0, {UNIT, UNIT}, "so many"}};
    struct kvd_error err;
    struct kvd_buffer *b;
    begin();
    for (size_t i = 0; i < KVD_LEN(wrong); i++) {
        const struct kvd_segment two[] = {{1, wrong[i].bytes[0]}, {2, wrong[i].bytes[1]}};
        ck_assert_int_ne(add(1, wrong[i].size, wrong[i].before, two, 2, &b, &err), KVD_OK);
        ck_assert_msg(strstr(err.text, wrong[i].text), "%zu: %s", i, err.text);
        ck_assert_uint_eq(check_all(), 0);
    }
}
END_TEST

// Each take of a share, the reserving and each segment refused in turn: of a first part, and of one
// that goes on.
START_TEST(a_refusal_changes_nothing)
{
    const struct kvd_segment three[] = {{1, UNIT}, {2, UNIT}, {3, UNIT}};
    struct kvd_error err;
    struct kvd_buffer *b = NULL;
    int refused = 0;
    for (uint64_t before = 0; before <= 3; before += 3) {
        begin();
        for (int i = 1; i <= 8; i++) {
            begin();
            refuses = i <= 5 ? i : 0;
            bad_segment = i > 5 ? (uint32_t)i - 5 : UINT32_MAX;
            if (add(1, 6 * UNIT, before * UNIT, three, 3, &b, &err)) {
                ck_assert_uint_eq(check_all(), before != 0);
                ck_assert(before == 0 || (b->mapped == 3 * UNIT && b->segments == 3));
                refused++;
            } else { // it has no such step
                ck_assert_int_eq(bad_segment, UINT32_MAX);
                kvd_session_drop_buffer(&s, b);
                begin();
                if (before)
                    ck_assert_int_eq(add(1, 6 * UNIT, 0, three, 3, &b, &err), KVD_OK);
            }
        }
        begin();
        if (before == 0)
            ck_assert_int_eq(add(1, 6 * UNIT, 0, three, 3, &b, &err), KVD_OK);
    }
    ck_assert_int_eq(refused, 8 + 4); // going on takes one share, and neither makes nor reserves
    drop_all();
}
END_TEST

START_TEST(any_calls)
{
    uint64_t r = kvd_test_seed("segments");
    struct kvd_error err;
    struct kvd_buffer *b, *next;
    uint32_t good = 0, whole = 0;
    begin();
    for (int step = 0; step < 200000; step++) {
        const uint64_t key = kvd_rand(&r) % KEYS, size = UNIT * (1 + kvd_rand(&r) % 400);
        struct kvd_segment segments[MOST];
        uint64_t before = 0;
        uint32_t n = 1 + (uint32_t)(kvd_rand(&r) % MOST);
        HASH_ITER(hh, s.buffers, b, next)
        if (b->key == key && kvd_rand(&r) % 4)
            break;
        const uint64_t all = b ? b->size : size;
        before = b && kvd_rand(&r) % 8 ? b->mapped : UNIT * (kvd_rand(&r) % 4);
        for (uint32_t i = 0; i < n; i++)
            segments[i] = (struct kvd_segment){(int)i, UNIT * (1 + kvd_rand(&r) % 6)};
        refuses = kvd_rand(&r) % 4 == 0 ? 1 + (int)(kvd_rand(&r) % 6) : 0;
        bad_segment = (uint32_t)(kvd_rand(&r) % 128);
        struct kvd_buffer *got = NULL;
        if (add(key, all, before, segments, n, &got, &err) == KVD_OK) {
            good++;
            whole += got->mapped == got->size;
        }
        check_all();
        if (kvd_rand(&r) % 32 == 0 && s.buffers)
            kvd_session_drop_buffer(&s, s.buffers);
    }
    ck_assert_msg(good > 10000 && whole > 100, "%u calls were good, %u buffers whole", good, whole);
    drop_all();
}
END_TEST

static void on_gone(struct kvd_buffer *b)
{
    ck_assert(b && mapped == 0 && reserved == 0);
    gone++;
}

// Unmapping takes long, so it is not the loop's. Until it is over all of it is charged, and whoever
// waits for it is not told.
START_TEST(it_is_unmapped_beside_the_loop)
{
    const struct kvd_segment two[] = {{1, UNIT}, {2, UNIT}};
    struct kvd_error err;
    struct kvd_buffer *b;
    begin();
    for (int whole = 0; whole < 2; whole++) {
        ck_assert_int_eq(add(1, (3 - (uint64_t)whole) * UNIT, 0, two, 2, &b, &err), KVD_OK);
        b->gone = on_gone;
        gone = 0;
        later = true;
        kvd_session_drop_buffer(&s, b);
        ck_assert(waits && !gone && mapped == 2 * UNIT && !s.buffers && s.buffer_bytes == 0);
        ck_assert_uint_eq(taken[KVD_SHARE_MAPPINGS], 3);
        waits->let_go(waits);
        ck_assert(!gone && mapped == 0);
        ck_assert_uint_eq(taken[KVD_SHARE_MAPPINGS], 3);
        waits->done(waits);
        ck_assert_uint_eq(gone, 1);
        waits = NULL;
        later = false;
        ck_assert_uint_eq(check_all(), 0);
    }
}
END_TEST

KVD_MAIN("segments", 60, parts_make_one_buffer, what_is_wrong_is_named, a_refusal_changes_nothing,
         any_calls, it_is_unmapped_beside_the_loop)

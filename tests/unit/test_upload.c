// Copies of which one job makes as many as there are, while others are added. The test is loop and
// executor in turn.
#include "daemon/core/lifecycle.h"
#include "daemon/sched/exec.h"
#include "daemon/sched/upload.h"
#include "tests/unit/suite.h"

enum { PAGE = 1 << 20, PLACE = 1000, OTHER = 2000, MOST = 1024 };

static struct kvd_daemon d;
static struct kvd_upload *u;
static struct kvd_job *job; // that is with the executor
static int works, checks;
static uint32_t moves, ends;
static int end_rc;

// What the backend was asked for.
static struct kvd_copy copies[MOST];
static uint32_t n_copies, begins, begins_before, under_way; // before: this slice
static int fails;         // the beginning or end that fails from now on, or 0
static bool adds_a_piece; // the loop does, while the executor waits

// -- the daemon around it -----------------------------------------------------------------------

void kvd_daemon_work_begin(struct kvd_daemon *daemon)
{
    (void)daemon;
    works++;
}

void kvd_daemon_work_end(struct kvd_daemon *daemon)
{
    (void)daemon;
    works--;
}

void kvd_daemon_check_device(struct kvd_daemon *daemon)
{
    (void)daemon;
    checks++;
}

static bool never(const struct kvd_slice *s)
{
    (void)s;
    return false;
}

static bool at_once(const struct kvd_slice *s)
{
    (void)s;
    return begins > begins_before;
}

static bool (*over)(const struct kvd_slice *s);

void kvd_exec_submit(struct kvd_daemon *daemon, struct kvd_job *j)
{
    (void)daemon;
    ck_assert_ptr_null(job);
    job = j;
    job->slice.over = over;
}

void kvd_exec_cancel(struct kvd_job *j)
{
    atomic_store(&j->cancelled, true);
}

static struct kvd_upload_copy copy_at(uint32_t to, uint32_t from)
{
    return (struct kvd_upload_copy){.to = (uint64_t)PLACE * PAGE + (uint64_t)to * PAGE,
                                    .from = (uint64_t)OTHER * PAGE + from * (PAGE + UINT64_C(4096)),
                                    .bytes = PAGE,
                                    .to_in = PLACE,
                                    .from_in = OTHER};
}

static void add(uint32_t to, uint32_t from)
{
    const struct kvd_upload_copy c = copy_at(to, from);
    ck_assert(kvd_upload_has_room(u));
    kvd_upload_add(u, &c, 1);
}

static int begin(struct kvd_backend *b, const struct kvd_copy *some, uint32_t n, uint32_t which,
                 struct kvd_error *err)
{
    (void)b;
    (void)which;
    ck_assert_uint_lt(under_way, KVD_COPIES_AT_ONCE);
    under_way++;
    begins++;
    ck_assert_uint_le(n_copies + n, MOST);
    if (n)
        memcpy(copies + n_copies, some, n * sizeof(*some));
    n_copies += n;
    return fails == 1 ? kvd_fail(err, KVD_E_INTERNAL, "no") : KVD_OK;
}

static int end(struct kvd_backend *b, uint32_t which, struct kvd_error *err)
{
    (void)b;
    (void)which;
    ck_assert_uint_gt(under_way, 0);
    under_way--;
    if (adds_a_piece)
        add(100, 0);
    adds_a_piece = false;
    return fails == 2 ? kvd_fail(err, KVD_E_INTERNAL, "no") : KVD_OK;
}

static const struct kvd_backend_ops ops = {.copy_begin = begin, .copy_end = end};
static struct kvd_backend backend = {.ops = &ops};

static void moved(void *ctx, bool ended, int rc)
{
    ck_assert_ptr_eq(ctx, &d);
    moves++;
    ends += ended;
    end_rc = ended ? rc : end_rc;
}

static void start_all(void)
{
    memset(&d, 0, sizeof(d));
    uv_loop_init(&d.loop);
    d.backend = &backend;
    job = NULL;
    works = checks = fails = 0;
    moves = ends = n_copies = begins = under_way = 0;
    over = never;
    adds_a_piece = false;
    ck_assert_int_eq(kvd_part_uploads.start(&d, NULL), KVD_OK);
    u = kvd_upload_new(&d, 3, NULL, moved, &d);
}

static void end_all(void)
{
    ck_assert_int_eq(works, 0);
    ck_assert(!kvd_upload_runs(u));
    kvd_upload_free(&u);
    kvd_part_uploads.end(&d);
    uv_run(&d.loop, UV_RUN_DEFAULT);
    kvd_part_uploads.deinit(&d);
    uv_loop_close(&d.loop);
}

// A slice. Whether there is more.
static bool run_slice(void)
{
    struct kvd_job *j = job;
    begins_before = begins;
    if (j->run(&d, j))
        return true;
    ck_assert_uint_eq(under_way, 0);
    job = NULL;
    j->done(&d, j);
    return false;
}

static void run_all(void)
{
    while (job)
        run_slice();
}

static void is_copy(uint32_t i, uint32_t to, uint32_t from, uint32_t pieces, uint32_t step)
{
    const struct kvd_upload_copy c = copy_at(to, from);
    ck_assert_uint_lt(i, n_copies);
    ck_assert_uint_eq(copies[i].to, c.to);
    ck_assert_uint_eq(copies[i].from, c.from);
    ck_assert_uint_eq(copies[i].bytes, PAGE);
    ck_assert_uint_eq(copies[i].pieces, pieces);
    if (pieces == 1)
        return;
    ck_assert_uint_eq(copies[i].to_stride, (uint64_t)step * PAGE);
    ck_assert_uint_eq(copies[i].from_stride, step * (PAGE + UINT64_C(4096)));
}

// -- tests --------------------------------------------------------------------------------------

START_TEST(pieces_are_done_in_the_order_in_which_they_were_added)
{
    start_all();
    ck_assert(!kvd_upload_runs(u));
    for (uint32_t i = 0; i < 40; i++)
        add(i * i, 2 * i);
    ck_assert(kvd_upload_runs(u));
    ck_assert_uint_eq(kvd_upload_done(u), 0);
    run_all();
    ck_assert_uint_eq(kvd_upload_done(u), 40);
    ck_assert_uint_eq(moves, 1);
    ck_assert_uint_eq(ends, 1);
    ck_assert_int_eq(end_rc, KVD_OK);
    ck_assert_uint_eq(kvd_upload_copies(u), n_copies);
    add(7, 7); // and once more
    run_all();
    ck_assert_uint_eq(kvd_upload_done(u), 41);
    ck_assert_uint_eq(ends, 2);
    end_all();
}
END_TEST

START_TEST(what_lies_at_equal_distances_is_one_copy)
{
    start_all();
    for (uint32_t i = 0; i < 6; i++) // upwards
        add(i, i);
    for (uint32_t i = 6; i-- > 0;) // downwards
        add(40 + 2 * i, 40 + 2 * i);
    add(60, 61); // up here and down there
    add(61, 60);
    run_all();
    ck_assert_uint_eq(n_copies, 4);
    is_copy(0, 0, 0, 6, 1);
    is_copy(1, 40, 40, 6, 2);
    is_copy(2, 60, 61, 1, 0);
    is_copy(3, 61, 60, 1, 0);
    ck_assert_uint_eq(kvd_upload_copies(u), 4);
    end_all();
}
END_TEST

START_TEST(what_lies_elsewhere_is_a_copy_of_its_own)
{
    start_all();
    struct kvd_upload_copy c[8];
    for (uint32_t i = 0; i < 8; i++)
        c[i] = copy_at(i, i);
    c[1].to_in = PLACE + 1; // another extent
    c[2].from_in = OTHER + 1;
    c[3].from_in = c[4].from_in = 0; // memory that is not pinned
    c[5].bytes /= 2;
    c[6].to = c[5].to + UINT64_C(8) * KVD_COPY_STRIDE_MOST;
    c[7].from = c[6].from + 4096; // overlaps
    for (uint32_t i = 0; i < 8; i++)
        kvd_upload_add(u, &c[i], 1);
    run_all();
    ck_assert_uint_eq(n_copies, 8);
    for (uint32_t i = 0; i < 8; i++) {
        ck_assert_uint_eq(copies[i].to, c[i].to);
        ck_assert_uint_eq(copies[i].from, c[i].from);
        ck_assert_uint_eq(copies[i].bytes, c[i].bytes);
    }
    end_all();
}
END_TEST

// Every plane has a run of its own.
START_TEST(planes_are_told_apart)
{
    start_all();
    for (uint32_t i = 0; i < 3; i++) {
        struct kvd_upload_copy c[KVD_MAX_PLANES];
        for (uint32_t p = 0; p < KVD_MAX_PLANES; p++) {
            c[p] = copy_at(100 * p + i, KVD_MAX_PLANES * i + p);
            c[p].bytes >>= p + 1;
            c[p].to_in += p;
        }
        kvd_upload_add(u, c, KVD_MAX_PLANES);
    }
    kvd_upload_add(u, NULL, 0); // a piece without pages
    run_all();
    ck_assert_uint_eq(n_copies, KVD_MAX_PLANES);
    for (uint32_t p = 0; p < KVD_MAX_PLANES; p++)
        ck_assert_uint_eq(copies[p].pieces, 3);
    ck_assert_uint_eq(kvd_upload_done(u), 4);
    end_all();
}
END_TEST

// So that the end of some is noticed while others are under way.
START_TEST(not_all_is_begun_at_once)
{
    start_all();
    for (uint32_t i = 0; i < 20; i++)
        add(3 * i, i % 2 ? 90 - i : i); // which do not go together
    for (uint32_t i = 0; i < 40; i++)
        add(100 + i, 100 + i);
    run_all();
    ck_assert_uint_eq(kvd_upload_done(u), 60);
    uint64_t pieces = 0, most = 0;
    for (uint32_t i = 0; i < n_copies; i++) {
        pieces += copies[i].pieces;
        most = KVD_MAX(most, copies[i].pieces);
    }
    ck_assert_uint_eq(pieces, 60);
    ck_assert_uint_eq(most, 16); // of a MiB each
    ck_assert_uint_ge(begins, 7);
    end_all();
}
END_TEST

START_TEST(a_slice_that_is_over_ends_what_it_has_begun)
{
    start_all();
    over = at_once;
    for (uint32_t i = 0; i < 12; i++)
        add(2 * i, i % 2);
    for (uint32_t slice = 1; slice < 3; slice++) {
        ck_assert(run_slice());
        ck_assert_uint_eq(under_way, 0);
        ck_assert_uint_eq(kvd_upload_done(u), 4 * slice);
    }
    ck_assert(!run_slice());
    ck_assert_uint_eq(kvd_upload_done(u), 12);
    end_all();
}
END_TEST

// Whatever is added too late for the executor to see is not forgotten.
START_TEST(pieces_may_be_added_while_it_runs)
{
    start_all();
    add(1, 1);
    adds_a_piece = true;
    run_slice();
    ck_assert_uint_eq(kvd_upload_done(u), 2);
    struct kvd_job *j;
    add(2, 2);
    j = job;
    while (j->run(&d, j))
        ;
    add(3, 3); // it has ended, and the loop has not heard of it
    job = NULL;
    j->done(&d, j);
    ck_assert_ptr_nonnull(job);
    ck_assert(kvd_upload_runs(u));
    run_all();
    ck_assert_uint_eq(kvd_upload_done(u), 4);
    end_all();
}
END_TEST

START_TEST(there_is_room_for_so_many)
{
    start_all();
    for (uint32_t i = 0; i < KVD_UPLOAD_MOST; i++)
        add(i, i);
    ck_assert(!kvd_upload_has_room(u));
    run_all();
    ck_assert(kvd_upload_has_room(u));
    ck_assert_uint_eq(kvd_upload_done(u), KVD_UPLOAD_MOST);
    end_all();
}
END_TEST

START_TEST(a_device_that_fails_ends_it)
{
    for (int i = 1; i <= 2; i++) {
        start_all();
        add(1, 1);
        fails = i;
        run_all();
        ck_assert_uint_eq(kvd_upload_done(u), 0);
        ck_assert_uint_eq(ends, 1);
        ck_assert_int_eq(end_rc, KVD_E_INTERNAL);
        ck_assert_int_eq(checks, 1);
        end_all();
    }
}
END_TEST

START_TEST(one_that_is_cancelled_or_abandoned_ends)
{
    start_all();
    add(1, 1);
    kvd_upload_cancel(u);
    struct kvd_job *j = job;
    while (j->run(&d, j))
        ;
    add(2, 2);
    job = NULL;
    j->done(&d, j);
    ck_assert_uint_eq(ends, 1);
    ck_assert_ptr_null(job);
    end_all();
    start_all();
    add(1, 1);
    j = KVD_TAKE(job);
    j->abandoned = true; // kvd stops
    j->done(&d, j);
    ck_assert_uint_eq(kvd_upload_done(u), 0);
    ck_assert_uint_eq(ends, 1);
    end_all();
}
END_TEST

// The loop hears of it, once, whenever it looks.
START_TEST(what_is_done_is_told_of_while_it_runs)
{
    start_all();
    over = at_once;
    add(1, 1);
    add(40, 2);
    for (uint32_t i = 0; i < 8; i++)
        add(100 + 3 * i, i % 2);
    ck_assert(run_slice());
    uv_run(&d.loop, UV_RUN_NOWAIT);
    ck_assert_uint_eq(moves, 1);
    ck_assert_uint_eq(ends, 0);
    uv_run(&d.loop, UV_RUN_NOWAIT);
    ck_assert_uint_eq(moves, 1);
    run_all();
    ck_assert_uint_eq(moves, 2);
    end_all();
}
END_TEST

KVD_MAIN("upload", 60, pieces_are_done_in_the_order_in_which_they_were_added,
         what_lies_at_equal_distances_is_one_copy, what_lies_elsewhere_is_a_copy_of_its_own,
         planes_are_told_apart, not_all_is_begun_at_once,
         a_slice_that_is_over_ends_what_it_has_begun, pieces_may_be_added_while_it_runs,
         there_is_room_for_so_many, a_device_that_fails_ends_it,
         one_that_is_cancelled_or_abandoned_ends, what_is_done_is_told_of_while_it_runs)

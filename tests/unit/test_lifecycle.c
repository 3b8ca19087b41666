// Parts of the daemon: in which order they live, and what stopping waits for.
#include "daemon/core/lifecycle.h"
#include "daemon/core/notify.h"
#include "tests/unit/suite.h"

static struct kvd_daemon d;
static char said[512]; // what parts did, in its order
static const char *fails;
static bool busy;

static void say(const char *what)
{
    snprintf(said + strlen(said), sizeof(said) - strlen(said), "%s ", what);
}

void kvd_notify_ready(struct kvd_daemon *daemon)
{
    (void)daemon;
    say("ready");
}

void kvd_notify_stopping(void)
{
    say("leaving");
}

static bool leaks; // the loop has handles in the end

void kvd_log_at(enum kvd_log_level level, const char *fmt, ...)
{
    leaks |= level == KVD_LOG_ERROR && strstr(fmt, "leak");
}

enum kvd_log_level kvd_log_get_level(void)
{
    return KVD_LOG_ERROR;
}

static int did(const char *what, struct kvd_error *err)
{
    say(what);
    return fails && strcmp(fails, what) == 0 ? kvd_fail(err, KVD_E_INTERNAL, "%s", what) : KVD_OK;
}

#define PART(n)                                                                                    \
    static int init_##n(struct kvd_daemon *daemon, struct kvd_error *err)                          \
    {                                                                                              \
        (void)daemon;                                                                              \
        return did("init-" #n, err);                                                               \
    }                                                                                              \
    static int start_##n(struct kvd_daemon *daemon, struct kvd_error *err)                         \
    {                                                                                              \
        (void)daemon;                                                                              \
        return did("start-" #n, err);                                                              \
    }                                                                                              \
    static void stop_##n(struct kvd_daemon *daemon)                                                \
    {                                                                                              \
        (void)daemon;                                                                              \
        say("stop-" #n);                                                                           \
    }                                                                                              \
    static void shut_##n(struct kvd_daemon *daemon)                                                \
    {                                                                                              \
        (void)daemon;                                                                              \
        say("shut-" #n);                                                                           \
    }                                                                                              \
    static void end_##n(struct kvd_daemon *daemon)                                                 \
    {                                                                                              \
        (void)daemon;                                                                              \
        say("end-" #n);                                                                            \
    }                                                                                              \
    static void deinit_##n(struct kvd_daemon *daemon)                                              \
    {                                                                                              \
        (void)daemon;                                                                              \
        say("deinit-" #n);                                                                         \
    }
PART(a)
PART(b)

static bool is_busy(const struct kvd_daemon *daemon)
{
    (void)daemon;
    return busy;
}

static void draining(struct kvd_daemon *daemon)
{
    (void)daemon;
    say("draining");
}

static void no_longer_busy(uv_timer_t *timer)
{
    say("done");
    busy = false;
    kvd_daemon_go_on(timer->data);
}

static void in(uv_timer_t *timer, uv_timer_cb what, uint64_t ms)
{
    uv_timer_init(&d.loop, timer);
    timer->data = &d;
    uv_timer_start(timer, what, ms, 0);
}

static void stop_slowly(struct kvd_daemon *daemon)
{
    static uv_timer_t later;
    (void)daemon;
    if (busy)
        in(&later, no_longer_busy, 5);
}

static const struct kvd_part a = {.init = init_a,
                                  .start = start_a,
                                  .stop = stop_a,
                                  .shut = shut_a,
                                  .end = end_a,
                                  .deinit = deinit_a};
static const struct kvd_part b = {.init = init_b,
                                  .start = start_b,
                                  .stop = stop_b,
                                  .busy = is_busy,
                                  .shut = shut_b,
                                  .end = end_b,
                                  .deinit = deinit_b,
                                  .draining = draining};
static const struct kvd_part nothing, c = {.stop = stop_slowly};
static const struct kvd_part *const parts[] = {&a, &nothing, &b, &c, NULL};

static const char *device(const struct kvd_backend *backend)
{
    (void)backend;
    return "none";
}

static bool is_lost;

static bool lost(struct kvd_backend *backend)
{
    (void)backend;
    return is_lost;
}

static const struct kvd_backend_ops ops = {.name = "none", .device = device, .lost = lost};
static struct kvd_backend backend = {&ops};

// Ends it, and looks that nothing is left in the loop.
static void end(void)
{
    kvd_daemon_deinit(&d);
    ck_assert(!leaks);
}

static void begin(void)
{
    memset(&d, 0, sizeof(d));
    said[0] = '\0';
    fails = NULL;
    busy = is_lost = leaks = false;
    d.parts = parts;
    d.backend = &backend;
}

static void drain(uv_timer_t *timer)
{
    kvd_daemon_drain(timer->data, 0);
}

START_TEST(they_start_in_order_and_end_against_it)
{
    struct kvd_error err;
    uv_timer_t now;
    begin();
    ck_assert_int_eq(kvd_daemon_init(&d, &err), KVD_OK);
    busy = true;
    in(&now, drain, 1);
    kvd_daemon_run(&d);
    ck_assert_int_eq(d.state, KVD_STOPPING);
    end();
    ck_assert_str_eq(said, "init-a init-b start-a start-b ready leaving draining stop-a stop-b "
                           "done shut-a shut-b end-b end-a deinit-b deinit-a ");
}
END_TEST

START_TEST(what_did_not_start_is_taken_back)
{
    struct kvd_error err;
    static const char *const at[] = {"init-a", "init-b", "start-a", "start-b"};
    for (uint32_t i = 0; i < KVD_LEN(at); i++) {
        begin();
        fails = at[i];
        ck_assert_int_eq(kvd_daemon_init(&d, &err), KVD_E_INTERNAL);
        end();
        const char *rest = strstr(said, at[i]) + strlen(at[i]);
        ck_assert_str_eq(rest, " end-b end-a deinit-b deinit-a ");
    }
}
END_TEST

static void end_session(uv_timer_t *timer)
{
    (void)timer;
    say("session-ends");
    d.n_sessions = 0;
    kvd_daemon_session_ended(&d);
}

START_TEST(draining_waits_for_sessions_and_work_beside_the_loop)
{
    struct kvd_error err;
    uv_timer_t later;
    begin();
    ck_assert_int_eq(kvd_daemon_init(&d, &err), KVD_OK);
    d.n_sessions = 1;
    kvd_daemon_drain(&d, 60000);
    kvd_daemon_drain(&d, 90000); // can only shorten it
    ck_assert_uint_le(d.drain_deadline_ms, kvd_now_ms(&d) + 60000);
    in(&later, end_session, 5);
    kvd_daemon_work_begin(&d);
    while (d.state != KVD_STOPPING)
        uv_run(&d.loop, UV_RUN_ONCE);
    ck_assert_ptr_null(strstr(said, "shut"));
    kvd_daemon_work_end(&d);
    ck_assert_str_eq(said, "init-a init-b start-a start-b leaving draining session-ends stop-a "
                           "stop-b shut-a shut-b ");
    end();
}
END_TEST

START_TEST(a_lost_device_ends_it)
{
    struct kvd_error err;
    begin();
    ck_assert_int_eq(kvd_daemon_init(&d, &err), KVD_OK);
    kvd_daemon_check_device(&d);
    ck_assert_int_eq(d.exit_code, 0);
    is_lost = true;
    kvd_daemon_check_device(&d);
    ck_assert_int_eq(d.exit_code, 70); // EX_SOFTWARE, as the README says
    ck_assert_int_eq(d.state, KVD_DRAINING);
    end();
}
END_TEST

KVD_MAIN("lifecycle", 30, they_start_in_order_and_end_against_it, what_did_not_start_is_taken_back,
         draining_waits_for_sessions_and_work_beside_the_loop, a_lost_device_ends_it)

// The tier on a real server, which the tests start, stop, kill and lie to.
#include <errno.h>
#include <fcntl.h>
#include <hiredis/hiredis.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "daemon/tier/pinned.h"
#include "daemon/tier/redis.h"
#include "tests/unit/scratch.h"
#include "tests/unit/tier_fixture.h"

enum { BYTES = 200000 };

struct server {
    uv_loop_t loop;
    char folder[64], socket[80], url[100];
    pid_t pid;
    struct kvd_tier *t;
    struct kvd_tier_settings settings;
};

static const char *program(void)
{
    static const char *const names[] = {"/usr/bin/valkey-server", "/usr/bin/redis-server"};
    for (size_t i = 0; i < KVD_LEN(names); i++)
        if (access(names[i], X_OK) == 0)
            return names[i];
    return NULL;
}

static redisContext *server_connect(const struct server *s)
{
    redisContext *c = redisConnectUnix(s->socket);
    for (uint32_t i = 0; i < 1000 && (!c || c->err); i++) {
        redisFree(c);
        usleep(5000);
        c = redisConnectUnix(s->socket);
    }
    ck_assert(c && !c->err);
    return c;
}

static void server_start(struct server *s, const char *option, const char *value)
{
    s->pid = fork();
    if (s->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); // should the test die first
        int null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        execl(program(), program(), "--port", "0", "--unixsocket", s->socket, "--save", "", "--dir",
              s->folder, option, value, (char *)NULL);
        _exit(127);
    }
    redisFree(server_connect(s));
}

static void server_stop(struct server *s)
{
    if (s->pid > 0) {
        kill(s->pid, SIGKILL);
        waitpid(s->pid, NULL, 0);
    }
    s->pid = 0;
}

// What a client says to it beside the tier; the reply as text.
static void say(const struct server *s, const char *fmt, ...)
{
    redisContext *c = server_connect(s);
    va_list ap;
    va_start(ap, fmt);
    redisReply *reply = redisvCommand(c, fmt, ap);
    va_end(ap);
    ck_assert_ptr_nonnull(reply);
    ck_assert_int_ne(reply->type, REDIS_REPLY_ERROR);
    freeReplyObject(reply);
    redisFree(c);
}

static void open_with(struct server *s, const char *url, const char *auth)
{
    struct kvd_error err = {0};
    void *state = kvd_tier_redis_new(url, auth, &err);
    ck_assert_msg(state != NULL, "%s", err.text);
    s->t = tier_open(&s->loop, &kvd_tier_redis_ops, state, &s->settings);
}

// False, and said why, where there is no server to be had.
static bool begin(struct server *s, const char *option, const char *value, const char *auth)
{
    signal(SIGPIPE, SIG_IGN); // as kvd does
    *s = (struct server){.folder = "/tmp/kvd-test-redis.XXXXXX", .settings = {.timeout_ms = 20000}};
    if (!program()) {
        printf("SKIP redis: neither valkey-server nor redis-server is installed\n");
        return false;
    }
    ck_assert_ptr_nonnull(mkdtemp(s->folder));
    snprintf(s->socket, sizeof(s->socket), "%s/s", s->folder);
    snprintf(s->url, sizeof(s->url), "unix:%s", s->socket);
    s->settings.memory = tier_memory = kvd_pinned_new(NULL, 1 << 20);
    uv_loop_init(&s->loop);
    server_start(s, option, value);
    open_with(s, s->url, auth);
    return true;
}

static void end(struct server *s)
{
    tier_end(&s->loop, &s->t);
    server_stop(s);
    ck_assert_int_eq(uv_loop_close(&s->loop), 0);
    kvd_pinned_free(&s->settings.memory);
    kvd_remove_folder(s->folder);
}

static void name_of(const struct server *s, uint64_t number, char out[80])
{
    struct kvd_tier_key key = tier_key(number, s->settings.secret);
    char hex[KVD_TIER_KEY_TEXT];
    kvd_hex(key.bytes, sizeof(key.bytes), hex);
    snprintf(out, 80, "%s%s", KVD_TIER_REDIS_PREFIX, hex);
}

static enum kvd_tier_result put(struct server *s, uint64_t i)
{
    return tier_put(&s->loop, s->t, i, BYTES, s->settings.secret);
}

static enum kvd_tier_result get(struct server *s, uint64_t i)
{
    return tier_get(&s->loop, s->t, i, BYTES, s->settings.secret);
}

START_TEST(blocks_come_back_and_others_are_left_alone)
{
    struct server s;
    struct answer a = {0};
    if (!begin(&s, "--databases", "16", ""))
        return;
    say(&s, "SET mine 1");
    ck_assert_int_eq(get(&s, 1), KVD_TIER_MISS);
    for (uint64_t i = 0; i < 30; i++)
        ck_assert_int_eq(put(&s, i), KVD_TIER_OK);
    for (uint64_t i = 0; i < 30; i++)
        ck_assert_int_eq(get(&s, i), KVD_TIER_OK);
    ck_assert(tier_has(&s.loop, s.t, 7) && !tier_has(&s.loop, s.t, 77));
    // Another kvd, and one with another database.
    struct kvd_tier *first = s.t;
    char url[128];
    open_with(&s, s.url, "");
    ck_assert_int_eq(get(&s, 3), KVD_TIER_OK);
    ck_assert(kvd_tier_close(&s.t));
    snprintf(url, sizeof(url), "%s?3", s.url);
    open_with(&s, url, "");
    ck_assert_int_eq(get(&s, 3), KVD_TIER_MISS);
    ck_assert(kvd_tier_close(&s.t));
    s.t = first;
    struct kvd_tier_key key = tier_key(7, NULL);
    kvd_tier_drop(s.t, &key, tier_answered, &a);
    tier_until(&s.loop, &a.n, 1);
    ck_assert_int_eq(get(&s, 7), KVD_TIER_MISS);
    kvd_tier_flush(s.t, tier_answered, &a);
    tier_until(&s.loop, &a.n, 2);
    ck_assert_int_eq(get(&s, 8), KVD_TIER_MISS);
    redisContext *c = server_connect(&s);
    redisReply *reply = redisCommand(c, "DBSIZE");
    ck_assert_int_eq(reply->integer, 1);
    freeReplyObject(reply);
    redisFree(c);
    end(&s);
}
END_TEST

START_TEST(what_others_put_there_is_dropped)
{
    struct server s;
    struct kvd_tier_status status;
    char name[80], other[80], path[] = "/tmp/kvd-test-secret.XXXXXX";
    if (!begin(&s, "--databases", "16", ""))
        return;
    int fd = mkstemp(path);
    ck_assert_int_eq(write(fd, "0123456789abcdef0123456789abcdef", 32), 32);
    struct kvd_tier_secret *secret = kvd_tier_secret_load(path, NULL);
    ck_assert_ptr_nonnull(secret);
    close(fd);
    unlink(path);
    tier_end(&s.loop, &s.t);
    s.settings.secret = secret;
    open_with(&s, s.url, "");
    for (uint64_t i = 0; i < 7; i++)
        ck_assert_int_eq(put(&s, i), KVD_TIER_OK);
    name_of(&s, 0, name);
    say(&s, "SETRANGE %s 5000 x", name); // a byte
    name_of(&s, 1, name);
    say(&s, "SET %s short", name);
    name_of(&s, 2, name);
    say(&s, "APPEND %s more", name);
    name_of(&s, 3, name);
    say(&s, "DEL %s", name);
    say(&s, "LPUSH %s a list", name);
    name_of(&s, 4, name); // a good one, elsewhere
    name_of(&s, 5, other);
    say(&s, "RENAME %s %s", name, other);
    name_of(&s, 6, name); // a good one but for the secret
    struct kvd_tier_key key = tier_key(6, secret);
    struct kvd_block *forged = tier_block(66, BYTES);
    size_t n;
    ck_assert_int_eq(kvd_block_seal(forged, NULL, &key, tier_layout, (uint64_t)time(NULL), NULL),
                     KVD_OK);
    uint8_t *value = kvd_block_value(forged, &n);
    say(&s, "SET %s %b", name, value, n);
    kvd_block_unref(&forged);
    static const uint64_t bad[] = {0, 1, 2, 3, 5, 6};
    for (size_t i = 0; i < KVD_LEN(bad); i++) {
        ck_assert_int_eq(get(&s, bad[i]), KVD_TIER_DAMAGED);
        ck_assert_int_eq(get(&s, bad[i]), KVD_TIER_MISS);
        ck_assert_int_eq(put(&s, bad[i]), KVD_TIER_OK);
        ck_assert_int_eq(get(&s, bad[i]), KVD_TIER_OK);
    }
    kvd_tier_status(s.t, &status);
    ck_assert_uint_eq(status.count[KVD_TIER_GET][KVD_TIER_DAMAGED], KVD_LEN(bad));
    ck_assert_str_eq(status.state, "ok");
    end(&s);
    kvd_tier_secret_free(&secret);
}
END_TEST

// Traffic goes on while the server is killed and started again: nothing wrong, nothing hangs.
START_TEST(a_server_that_is_killed_and_started_again)
{
    struct server s;
    struct answer a = {0};
    struct kvd_tier_status status;
    if (!begin(&s, "--databases", "16", ""))
        return;
    for (uint64_t i = 0; i < 8; i++)
        ck_assert_int_eq(put(&s, i), KVD_TIER_OK);
    uint32_t asked = 0;
    for (; asked < 40; asked++) {
        struct kvd_tier_key key = tier_key(asked % 8, NULL);
        struct kvd_block *b = tier_block(asked % 8, BYTES);
        kvd_tier_put(s.t, &key, tier_layout, b, tier_answered, &a);
        kvd_block_unref(&b);
        if (asked == 20)
            kill(s.pid, SIGKILL);
    }
    tier_until(&s.loop, &a.n, asked);
    server_stop(&s);
    kvd_block_unref(&a.block);
    for (uint32_t i = 0; i < 20; i++) {
        enum kvd_tier_result rc = get(&s, i % 8);
        ck_assert(rc == KVD_TIER_FAILED || rc == KVD_TIER_REFUSED);
    }
    kvd_tier_status(s.t, &status);
    ck_assert_str_eq(status.state, "failing");
    server_start(&s, "--databases", "16");
    enum kvd_tier_result rc = KVD_TIER_REFUSED;
    for (uint32_t i = 0; i < 400 && rc != KVD_TIER_OK; i++) {
        rc = put(&s, 1);
        tier_sleep(&s.loop, 20);
    }
    kvd_tier_status(s.t, &status);
    ck_assert_msg(rc == KVD_TIER_OK, "%s: %s", status.state, status.why);
    ck_assert_int_eq(get(&s, 1), KVD_TIER_OK);
    ck_assert_int_eq(get(&s, 2), KVD_TIER_MISS); // its memory was all it had
    end(&s);
}
END_TEST

START_TEST(a_server_that_is_stopped)
{
    struct server s;
    struct answer a = {0};
    struct kvd_tier_status status;
    if (!begin(&s, "--databases", "16", ""))
        return;
    ck_assert_int_eq(put(&s, 1), KVD_TIER_OK);
    tier_end(&s.loop, &s.t);
    s.settings.timeout_ms = 100;
    open_with(&s, s.url, "");
    enum kvd_tier_result rc = KVD_TIER_TIMEOUT;
    for (uint32_t i = 0; i < 400 && rc != KVD_TIER_OK;
         i++) { // 100 ms may be short for a server too
        rc = get(&s, 1);
        tier_sleep(&s.loop, 20);
    }
    ck_assert_int_eq(rc, KVD_TIER_OK);
    kill(s.pid, SIGSTOP);
    struct kvd_tier_key key = tier_key(1, NULL);
    struct kvd_block *b = tier_block(1, BYTES);
    for (uint32_t i = 0; i < 10; i++)
        kvd_tier_put(s.t, &key, tier_layout, b, tier_answered, &a);
    for (uint32_t i = 0; i < 10; i++)
        kvd_tier_get(s.t, &key, tier_layout, BYTES, tier_answered, &a);
    tier_until(&s.loop, &a.n, 20);
    ck_assert_ptr_null(a.block);
    // It is hung up on, so that nothing is held for it any more.
    for (uint32_t i = 0; i < 200 && atomic_load(&b->refs) > 1; i++)
        tier_sleep(&s.loop, 10);
    ck_assert_uint_eq(atomic_load(&b->refs), 1);
    kvd_block_unref(&b);
    kvd_tier_status(s.t, &status);
    ck_assert_uint_ge(status.count[KVD_TIER_GET][KVD_TIER_TIMEOUT] +
                          status.count[KVD_TIER_PUT][KVD_TIER_TIMEOUT],
                      1);
    // Ends while it hangs, with operations on the way.
    uint64_t began = uv_hrtime();
    tier_end(&s.loop, &s.t);
    ck_assert_uint_le(tier_ms_since(began), 15000); // the server hangs for ever
    kill(s.pid, SIGCONT);
    open_with(&s, s.url, "");
    rc = KVD_TIER_REFUSED;
    for (uint32_t i = 0; i < 400 && rc != KVD_TIER_OK; i++) {
        rc = get(&s, 1);
        tier_sleep(&s.loop, 20);
    }
    ck_assert_int_eq(rc, KVD_TIER_OK);
    end(&s);
}
END_TEST

START_TEST(passwords_expiry_and_memory)
{
    struct server s;
    struct kvd_tier_status status;
    char name[80];
    if (!begin(&s, "--requirepass", "open sesame", "open sesame"))
        return;
    ck_assert_int_eq(put(&s, 1), KVD_TIER_OK);
    struct kvd_tier *good = s.t;
    open_with(&s, s.url, "wrong");
    ck_assert_int_eq(get(&s, 1), KVD_TIER_FAILED);
    kvd_tier_status(s.t, &status);
    ck_assert_msg(strstr(status.why, "WRONGPASS") || strstr(status.why, "NOAUTH"), "%s",
                  status.why);
    ck_assert(kvd_tier_close(&s.t));
    open_with(&s, s.url, "default:open sesame");
    ck_assert_int_eq(get(&s, 1), KVD_TIER_OK);
    ck_assert(kvd_tier_close(&s.t));
    s.settings.ttl_s = 100;
    open_with(&s, s.url, "open sesame");
    ck_assert_int_eq(put(&s, 2), KVD_TIER_OK);
    redisContext *c = server_connect(&s);
    freeReplyObject(redisCommand(c, "AUTH %s", "open sesame"));
    name_of(&s, 2, name);
    redisReply *reply = redisCommand(c, "TTL %s", name);
    ck_assert_int_ge(reply->integer, 90);
    ck_assert_int_le(reply->integer, 100);
    freeReplyObject(reply);
    freeReplyObject(redisCommand(c, "CONFIG SET maxmemory 1mb"));
    redisFree(c);
    enum kvd_tier_result rc = KVD_TIER_OK;
    for (uint64_t i = 0; i < 20 && rc == KVD_TIER_OK; i++)
        rc = put(&s, 10 + i);
    ck_assert_int_eq(rc, KVD_TIER_FULL);
    ck_assert_int_eq(get(&s, 1), KVD_TIER_OK);
    ck_assert(kvd_tier_close(&good));
    end(&s);
}
END_TEST

// Larger than what a socket takes at once: what is asked meanwhile, by the tier itself too, neither
// gets into them nor is lost.
START_TEST(much_is_asked_while_large_blocks_are_on_their_way)
{
    enum { LARGE = 1500001, MANY = 12 };
    struct server s;
    struct answer put_ones = {0}, got = {0}, had = {0};
    struct kvd_tier_key keys[MANY], damaged = tier_key(100, NULL);
    char name[80];
    if (!begin(&s, "--databases", "16", ""))
        return;
    ck_assert_int_eq(put(&s, 100), KVD_TIER_OK);
    name_of(&s, 100, name);
    for (uint32_t i = 0; i < MANY; i++)
        keys[i] = tier_key(i, NULL);
    for (uint32_t round = 0; round < 3; round++) {
        say(&s, "SET %s damaged", name);
        for (uint32_t i = 0; i < MANY; i++) {
            struct kvd_block *b = tier_block(i, LARGE);
            kvd_tier_put(s.t, &keys[i], tier_layout, b, tier_answered, &put_ones);
            kvd_block_unref(&b);
            kvd_tier_get(s.t, &damaged, tier_layout, BYTES, tier_answered, &got); // is unlinked
            kvd_tier_has(s.t, keys, 8, tier_answered, &had);
        }
        tier_until(&s.loop, &put_ones.n, (round + 1) * MANY);
        tier_until(&s.loop, &got.n, (round + 1) * MANY);
        tier_until(&s.loop, &had.n, (round + 1) * MANY);
        ck_assert_int_eq(put_ones.result, KVD_TIER_OK);
        ck_assert_int_eq(had.result, KVD_TIER_OK);
        ck_assert_int_eq(got.result, KVD_TIER_MISS);
        for (uint32_t i = 0; i < MANY; i++)
            ck_assert_int_eq(tier_get(&s.loop, s.t, i, LARGE, NULL), KVD_TIER_OK);
    }
    struct kvd_tier_status status;
    kvd_tier_status(s.t, &status);
    ck_assert_uint_ge(status.count[KVD_TIER_GET][KVD_TIER_DAMAGED], 3);
    ck_assert_uint_eq(status.count[KVD_TIER_PUT][KVD_TIER_FAILED], 0);
    // Killed amid one.
    kill(s.pid, SIGSTOP);
    for (uint32_t i = 0; i < MANY; i++) {
        struct kvd_block *b = tier_block(i, LARGE);
        kvd_tier_put(s.t, &keys[i], tier_layout, b, tier_answered, &put_ones);
        kvd_block_unref(&b);
        kvd_tier_has(s.t, keys, 8, tier_answered, &had);
    }
    tier_sleep(&s.loop, 100);
    server_stop(&s);
    tier_until(&s.loop, &put_ones.n, 4 * MANY);
    tier_until(&s.loop, &had.n, 4 * MANY);
    ck_assert_int_ne(put_ones.result, KVD_TIER_OK);
    end(&s);
}
END_TEST

// It says so when it has read how long the value is, and hears of nothing more.
START_TEST(a_server_that_refuses_a_block_before_it_has_it)
{
    enum { LARGE = 4000000 };
    struct server s;
    if (!begin(&s, "--proto-max-bulk-len", "1048576", ""))
        return;
    for (uint64_t i = 0; i < 10; i++) {
        enum kvd_tier_result rc = tier_put(&s.loop, s.t, 50 + i, LARGE, NULL);
        ck_assert(rc == KVD_TIER_FAILED || rc == KVD_TIER_REFUSED);
        for (uint32_t again = 0; again < 400 && rc != KVD_TIER_OK; again++) {
            rc = put(&s, i);
            tier_sleep(&s.loop, 5);
        }
        ck_assert_int_eq(rc, KVD_TIER_OK);
        ck_assert_int_eq(get(&s, i), KVD_TIER_OK);
    }
    end(&s);
}
END_TEST

// Says hello, and no to the first SET that it sees the beginning of; then it reads on. Exits with
// how many whole blocks it was sent.
static void liar(int listener, size_t block)
{
    static char buf[1 << 16];
    size_t all = 0;
    bool refused = false;
    int fd = accept(listener, NULL, NULL);
    for (ssize_t n; (n = read(fd, buf, sizeof(buf) - 1)) > 0; all += (size_t)n) {
        buf[n] = '\0';
        if (strstr(buf, "PING"))
            (void)!write(fd, "+PONG\r\n", 7);
        if (strstr(buf, "SET") && !refused) {
            refused = true;
            (void)!write(fd, "-ERR no\r\n", 9);
            usleep(200000);
        }
    }
    _exit((int)(all / block));
}

// Ends the tier and its server; what it returns listens where that was.
static int listen_instead(struct server *s)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    tier_end(&s->loop, &s->t);
    server_stop(s);
    unlink(s->socket);
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", s->socket);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    ck_assert_int_eq(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
    ck_assert_int_eq(listen(listener, 1), 0);
    return listener;
}

START_TEST(a_server_that_says_no_amid_a_block_is_hung_up_on)
{
    enum { LARGE = 4000000 };
    struct server s;
    int status;
    if (!begin(&s, "--databases", "16", ""))
        return;
    int listener = listen_instead(&s);
    pid_t pid = fork();
    if (pid == 0)
        liar(listener, LARGE);
    close(listener);
    open_with(&s, s.url, "");
    ck_assert_int_eq(tier_put(&s.loop, s.t, 1, LARGE, NULL), KVD_TIER_FAILED);
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert_int_eq(status, 0); // its rest was not sent
    end(&s);
}
END_TEST

static void wait_state(struct server *s, const char *state, const char *why)
{
    struct kvd_tier_status status = {.state = ""};
    for (uint32_t i = 0; i < 2000 && strcmp(status.state, state); i++) {
        tier_sleep(&s->loop, 5);
        kvd_tier_status(s->t, &status);
    }
    ck_assert_str_eq(status.state, state);
    ck_assert_msg(strstr(status.why, why) != NULL, "%s", status.why);
}

// Before anything is asked of it.
START_TEST(a_server_that_is_not_there_or_lets_nobody_in_is_known_from_the_start)
{
    struct server s;
    if (!begin(&s, "--requirepass", "open sesame", "wrong"))
        return;
    wait_state(&s, "failing", "WRONGPASS");
    tier_end(&s.loop, &s.t);
    server_stop(&s);
    unlink(s.socket);
    open_with(&s, s.url, "");
    wait_state(&s, "failing", "No such file");
    server_start(&s, "--databases", "16");
    ck_assert_int_eq(put(&s, 1), KVD_TIER_OK); // it was not left alone
    wait_state(&s, "ok", "");
    end(&s);
}
END_TEST

// One that takes the connection, and says nothing.
START_TEST(a_server_that_says_nothing_is_known_before_it_is_wanted)
{
    struct server s;
    if (!begin(&s, "--databases", "16", ""))
        return;
    int listener = listen_instead(&s);
    open_with(&s, s.url, "");
    wait_state(&s, "failing", "does not answer");
    close(listener);
    unlink(s.socket);
    server_start(&s, "--databases", "16");
    wait_state(&s, "ok", "");
    end(&s);
}
END_TEST

KVD_MAIN("tier_redis", 60, blocks_come_back_and_others_are_left_alone,
         what_others_put_there_is_dropped, a_server_that_is_killed_and_started_again,
         a_server_that_is_stopped, passwords_expiry_and_memory,
         much_is_asked_while_large_blocks_are_on_their_way,
         a_server_that_refuses_a_block_before_it_has_it,
         a_server_that_says_no_amid_a_block_is_hung_up_on,
         a_server_that_is_not_there_or_lets_nobody_in_is_known_from_the_start,
         a_server_that_says_nothing_is_known_before_it_is_wanted)

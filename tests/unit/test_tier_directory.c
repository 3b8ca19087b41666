// The tier in a directory: what is stored, limits, time, and file systems that do not do as they
// are told.
#include <errno.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "daemon/tier/directory.h"
#include "daemon/tier/host.h"
#include "daemon/tier/pinned.h"
#include "tests/unit/scratch.h"
#include "tests/unit/tier_fixture.h"

enum { BYTES = 20000 };

struct place {
    uv_loop_t loop;
    char folder[64], path[80];
    struct kvd_tier *t;
    struct kvd_tier_settings settings;
    uint64_t limit;
};

static void place_open(struct place *p)
{
    struct kvd_error err = {0};
    void *state = kvd_tier_directory_new(p->path, p->limit, p->settings.ttl_s, &err);
    ck_assert_msg(state != NULL, "%s", err.text);
    p->t = tier_open(&p->loop, &kvd_tier_directory_ops, state, &p->settings);
}

static void place_begin(struct place *p)
{
    *p = (struct place){
        .folder = "/tmp/kvd-test-tier.XXXXXX", .settings = {.timeout_ms = 5000}, .limit = 1 << 20};
    p->settings.memory = tier_memory = kvd_pinned_new(NULL, 1 << 20);
    ck_assert_ptr_nonnull(mkdtemp(p->folder));
    snprintf(p->path, sizeof(p->path), "%s/blocks", p->folder);
    uv_loop_init(&p->loop);
    place_open(p);
}

static void place_end(struct place *p)
{
    tier_end(&p->loop, &p->t);
    ck_assert_int_eq(uv_loop_close(&p->loop), 0);
    kvd_pinned_free(&p->settings.memory);
    kvd_remove_folder(p->folder);
}

static void file_of(const struct place *p, uint64_t number, char out[256])
{
    struct kvd_tier_key key = tier_key(number, p->settings.secret);
    char hex[KVD_TIER_KEY_TEXT];
    kvd_hex(key.bytes, sizeof(key.bytes), hex);
    snprintf(out, 256, "%s/%.2s/%s", p->path, hex, hex + 2);
}

static uint64_t file_count(const struct place *p)
{
    char command[256];
    unsigned n = 0;
    snprintf(command, sizeof(command), "find %s -type f | wc -l", p->path);
    FILE *f = popen(command, "r");
    ck_assert_int_eq(fscanf(f, "%u", &n), 1);
    pclose(f);
    return n;
}

static uint64_t known(const struct place *p)
{
    struct kvd_tier_status s;
    kvd_tier_status(p->t, &s);
    return s.blocks;
}

static void wait_known(struct place *p, uint64_t n)
{
    for (uint32_t i = 0; i < 1000 && known(p) != n; i++)
        tier_sleep(&p->loop, 5);
    ck_assert_uint_eq(known(p), n);
}

START_TEST(a_directory_outlives_the_one_that_filled_it)
{
    struct place p;
    struct stat st;
    char file[256];
    place_begin(&p);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_MISS);
    for (uint64_t i = 0; i < 20; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK); // again
    ck_assert_uint_eq(file_count(&p), 20);
    ck_assert_uint_eq(known(&p), 20);
    file_of(&p, 3, file);
    ck_assert_int_eq(stat(file, &st), 0);
    ck_assert_int_eq(st.st_mode & 07777, 0600);
    tier_end(&p.loop, &p.t);
    place_open(&p);
    wait_known(&p, 20);
    for (uint64_t i = 0; i < 20; i++)
        ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    ck_assert(tier_has(&p.loop, p.t, 7) && !tier_has(&p.loop, p.t, 77));
    struct answer a = {0};
    struct kvd_tier_key key = tier_key(7, NULL);
    kvd_tier_drop(p.t, &key, tier_answered, &a);
    tier_until(&p.loop, &a.n, 1);
    ck_assert(!tier_has(&p.loop, p.t, 7));
    kvd_tier_flush(p.t, tier_answered, &a);
    tier_until(&p.loop, &a.n, 2);
    ck_assert_uint_eq(file_count(&p), 0);
    ck_assert_uint_eq(known(&p), 0);
    place_end(&p);
}
END_TEST

START_TEST(files_that_are_not_what_was_written_are_dropped)
{
    struct place p;
    char file[256], other[256];
    struct kvd_tier_status s;
    place_begin(&p);
    for (uint64_t i = 0; i < 6; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    file_of(&p, 0, file); // torn
    ck_assert_int_eq(truncate(file, 8192), 0);
    file_of(&p, 1, file); // as a crash leaves it: the length, and nothing in it
    struct stat st;
    stat(file, &st);
    ck_assert_int_eq(truncate(file, 0) + truncate(file, st.st_size), 0);
    file_of(&p, 2, file); // a bit
    int fd = open(file, O_RDWR);
    uint8_t byte;
    ck_assert_int_eq(pread(fd, &byte, 1, 9000), 1);
    byte ^= 0x10;
    ck_assert_int_eq(pwrite(fd, &byte, 1, 9000), 1);
    close(fd);
    file_of(&p, 3, file); // another's
    file_of(&p, 4, other);
    ck_assert_int_eq(rename(other, file), 0);
    for (uint64_t i = 0; i < 4; i++) {
        ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_DAMAGED);
        ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_MISS);
    }
    ck_assert_int_eq(tier_get(&p.loop, p.t, 5, BYTES, NULL), KVD_TIER_OK);
    kvd_tier_status(p.t, &s);
    ck_assert_uint_eq(s.count[KVD_TIER_GET][KVD_TIER_DAMAGED], 4);
    ck_assert_str_eq(s.state, "ok"); // no reason to leave it alone
    place_end(&p);
}
END_TEST

// Also without anybody who gets it and finds it damaged.
START_TEST(a_file_of_another_length_is_written_anew)
{
    struct place p;
    char file[256];
    place_begin(&p);
    for (p.settings.ttl_s = 0; p.settings.ttl_s < 200; p.settings.ttl_s += 100) {
        tier_end(&p.loop, &p.t);
        place_open(&p);
        for (uint64_t i = 0; i < 2; i++) {
            ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
            file_of(&p, i, file);
            ck_assert_int_eq(truncate(file, i ? 4096 : 1 << 16), 0);
            ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
            ck_assert_int_eq(tier_get(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
        }
    }
    place_end(&p);
}
END_TEST

START_TEST(a_file_forged_without_the_secret_is_dropped)
{
    struct place p;
    struct kvd_tier_secret *secret = tier_secret_of("0123456789abcdef0123456789abcdef");
    char file[256];
    size_t n;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    p.settings.secret = secret;
    place_open(&p);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_OK);
    struct kvd_tier_key key = tier_key(1, secret);
    struct kvd_block *forged = tier_block(2, BYTES);
    ck_assert_int_eq(kvd_block_seal(forged, NULL, &key, tier_layout, (uint64_t)time(NULL), NULL),
                     KVD_OK);
    uint8_t *data = kvd_block_padded(forged, &n);
    file_of(&p, 1, file);
    int fd = open(file, O_WRONLY | O_TRUNC);
    ck_assert_int_eq(write(fd, data, n), (ssize_t)n);
    close(fd);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_DAMAGED);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, secret), KVD_TIER_MISS);
    kvd_block_unref(&forged);
    place_end(&p);
    kvd_tier_secret_free(&secret);
}
END_TEST

START_TEST(a_directory_keeps_its_limit_and_what_is_used)
{
    struct place p;
    struct kvd_tier_status s;
    char file[256];
    place_begin(&p); // 1 MiB: 42 files of 24 KiB
    for (uint64_t i = 0; i < 60; i++) {
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
        ck_assert_int_eq(tier_get(&p.loop, p.t, 0, BYTES, NULL), KVD_TIER_OK);
    }
    kvd_tier_status(p.t, &s);
    ck_assert_uint_le(s.bytes, p.limit);
    ck_assert_uint_eq(s.blocks, file_count(&p));
    ck_assert_uint_eq(s.blocks, 42);
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_ROOM], 60 - 42);
    ck_assert_uint_eq(s.lost.ages.count, 60 - 42);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 99, 1 << 20, NULL), KVD_TIER_FULL);
    tier_end(&p.loop, &p.t);
    // A smaller limit holds for what is there; files that never got their name go when they are
    // old.
    file_of(&p, 0, file);
    strcat(file, ".1-1.new");
    close(open(file, O_CREAT | O_WRONLY, 0600));
    struct timespec old[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    ck_assert_int_eq(utimensat(AT_FDCWD, file, old, 0), 0);
    p.limit = 10 * 28672;
    place_open(&p);
    wait_known(&p, 11);
    ck_assert_uint_eq(file_count(&p), 11);
    place_end(&p);
}
END_TEST

START_TEST(two_share_a_directory)
{
    struct place p;
    place_begin(&p);
    struct kvd_tier *first = p.t;
    place_open(&p);
    ck_assert_int_eq(tier_put(&p.loop, first, 1, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 2, BYTES, NULL), KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, first, 2, BYTES, NULL), KVD_TIER_OK);
    ck_assert(kvd_tier_close(&first));
    place_end(&p);
}
END_TEST

// Puts two, and gets one again before its time is over: if the machine is too slow, they have more.
static void put_in_time(struct place *p)
{
    for (p->settings.ttl_s = 1;; p->settings.ttl_s *= 4) {
        place_open(p);
        uint64_t began = uv_hrtime();
        ck_assert_int_eq(tier_put(&p->loop, p->t, 1, BYTES, NULL), KVD_TIER_OK);
        ck_assert_int_eq(tier_put(&p->loop, p->t, 2, BYTES, NULL), KVD_TIER_OK);
        enum kvd_tier_result rc = tier_get(&p->loop, p->t, 1, BYTES, NULL);
        if (rc == KVD_TIER_OK)
            return;
        ck_assert_uint_ge(tier_ms_since(began), p->settings.ttl_s * 1000);
        tier_end(&p->loop, &p->t);
    }
}

START_TEST(blocks_expire)
{
    struct place p;
    struct kvd_tier_status s;
    char file[256];
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    put_in_time(&p);
    tier_sleep(&p.loop, p.settings.ttl_s * 1000 + 1100);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_MISS);
    file_of(&p, 1, file);
    ck_assert_int_ne(access(file, F_OK), 0);
    ck_assert(!tier_has(&p.loop, p.t, 2));
    kvd_tier_status(p.t, &s);
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_EXPIRED], 1); // the other is there still
    tier_end(&p.loop, &p.t);
    place_open(&p); // and go when nobody asks for them
    file_of(&p, 2, file);
    for (uint32_t i = 0; i < 1000 && access(file, F_OK) == 0; i++)
        tier_sleep(&p.loop, 5);
    ck_assert_int_ne(access(file, F_OK), 0);
    kvd_tier_status(p.t, &s);
    for (uint32_t i = 0; i < 1000 && !s.lost.blocks[KVD_TIER_LOST_EXPIRED]; i++) {
        tier_sleep(&p.loop, 5);
        kvd_tier_status(p.t, &s);
    }
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_EXPIRED], 1);
    ck_assert_uint_eq(s.lost.ages.count, 0); // that is no age at which room was wanted
    place_end(&p);
}
END_TEST

// Twice the same is put, four fifths of its time apart, and got as late again. False: the machine
// was slower than its time, and nothing is told.
static bool renewed(uint64_t ttl_s)
{
    struct place p;
    bool in_time = true;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    p.settings.ttl_s = ttl_s;
    place_open(&p);
    struct kvd_tier *host =
        tier_open(&p.loop, &kvd_tier_host_ops, kvd_tier_host_new(1 << 20), &p.settings);
    uint64_t last = uv_hrtime();
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
        ck_assert_int_eq(tier_put(&p.loop, host, 1, BYTES, NULL), KVD_TIER_OK);
        in_time = in_time && tier_ms_since(last) < ttl_s * 1000;
        last = i ? last : uv_hrtime();
        tier_sleep(&p.loop, ttl_s * 800);
    }
    enum kvd_tier_result kept = tier_get(&p.loop, p.t, 1, BYTES, NULL);
    tier_memory = NULL; // it gives what was put
    enum kvd_tier_result held = tier_get(&p.loop, host, 1, BYTES, NULL);
    in_time = in_time && tier_ms_since(last) < ttl_s * 1800;
    ck_assert(!in_time || (kept == KVD_TIER_OK && held == KVD_TIER_OK && file_count(&p) == 1));
    ck_assert(kvd_tier_close(&host));
    place_end(&p);
    return in_time;
}

// A directory's and the host's memory's; a server's is renewed by the server.
START_TEST(a_put_of_what_is_there_renews_its_time)
{
    ck_assert(renewed(2) || renewed(8));
}
END_TEST

// A disk that others have filled: puts are refused, what is there is served, nothing is left over.
START_TEST(a_full_disk_is_noticed)
{
    struct place p;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    mkdir(p.path, 0700);
    if (mount("kvd-test", p.path, "tmpfs", 0, "size=256k,mode=0700")) {
        printf("SKIP a full disk: mount: %s\n", strerror(errno));
        place_open(&p);
        place_end(&p);
        return;
    }
    place_open(&p);
    enum kvd_tier_result rc = KVD_TIER_OK;
    uint64_t stored = 0;
    while (rc == KVD_TIER_OK && stored < 60)
        rc = tier_put(&p.loop, p.t, stored++, BYTES, NULL);
    stored--;
    uint64_t files = file_count(&p);
    struct kvd_tier_status s;
    kvd_tier_status(p.t, &s);
    for (uint64_t i = 0; i < stored && rc == KVD_TIER_FULL; i++)
        if (tier_get(&p.loop, p.t, i, BYTES, NULL) != KVD_TIER_OK)
            rc = KVD_TIER_FAILED;
    tier_end(&p.loop, &p.t);
    umount2(p.path, MNT_DETACH);
    ck_assert_int_eq(rc, KVD_TIER_FULL);
    ck_assert_uint_ge(stored, 5);
    ck_assert_uint_eq(files, stored);
    ck_assert_str_eq(s.state, "full");
    ck_assert_ptr_nonnull(strstr(s.why, "No space"));
    place_open(&p);
    place_end(&p);
}
END_TEST

static enum kvd_tier_result drop(struct place *p, uint64_t number)
{
    struct answer a = {0};
    struct kvd_tier_key key = tier_key(number, NULL);
    kvd_tier_drop(p->t, &key, tier_answered, &a);
    tier_until(&p->loop, &a.n, 1);
    return a.result;
}

// As a read-only mount, or one with files of somebody else. What stays is said to, and known still.
START_TEST(what_cannot_be_dropped_is_told_of)
{
    struct place p;
    struct kvd_tier_status s;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    mkdir(p.path, 0700);
    if (mount("kvd-test", p.path, "tmpfs", 0, "mode=0700")) {
        printf("SKIP what cannot be dropped: mount: %s\n", strerror(errno));
        place_open(&p);
        place_end(&p);
        return;
    }
    p.limit = 40 * 24576;
    place_open(&p);
    for (uint64_t i = 0; i < 40; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
    bool read_only = mount(NULL, p.path, NULL, MS_REMOUNT | MS_RDONLY, NULL) == 0;
    enum kvd_tier_result dropped = drop(&p, 1), got = tier_get(&p.loop, p.t, 1, BYTES, NULL);
    enum kvd_tier_result full = tier_put(&p.loop, p.t, 99, BYTES, NULL);
    struct answer a = {0};
    kvd_tier_flush(p.t, tier_answered, &a);
    tier_until(&p.loop, &a.n, 1);
    kvd_tier_status(p.t, &s);
    enum kvd_tier_result again = tier_get(&p.loop, p.t, 2, BYTES, NULL);
    mount(NULL, p.path, NULL, MS_REMOUNT, NULL);
    struct answer b = {0};
    kvd_tier_flush(p.t, tier_answered, &b);
    tier_until(&p.loop, &b.n, 1);
    uint64_t left = file_count(&p), known_left = known(&p);
    tier_end(&p.loop, &p.t);
    umount2(p.path, MNT_DETACH);
    ck_assert(read_only);
    ck_assert_int_eq(dropped, KVD_TIER_FAILED);
    ck_assert_int_eq(got, KVD_TIER_OK);
    ck_assert_int_eq(full, KVD_TIER_FULL);
    ck_assert_int_eq(a.result, KVD_TIER_FAILED);
    ck_assert_ptr_nonnull(strstr(s.why, "40 files stay: Read-only"));
    ck_assert_uint_eq(s.blocks, 40);
    ck_assert_uint_eq(s.lost.blocks[KVD_TIER_LOST_ROOM], 0);
    ck_assert_int_eq(again, KVD_TIER_OK);
    ck_assert_int_eq(b.result, KVD_TIER_OK);
    ck_assert_uint_eq(left + known_left, 0);
    place_open(&p);
    place_end(&p);
}
END_TEST

// Descriptors of the directory, whether it is there still or not.
static uint32_t descriptors(const struct place *p)
{
    uint32_t n = 0;
    for (int fd = 0; fd < 1000; fd++) {
        char link[40], target[256];
        snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
        ssize_t bytes = readlink(link, target, sizeof(target) - 1);
        target[bytes < 0 ? 0 : bytes] = 0;
        n += !strncmp(target, p->path, strlen(p->path));
    }
    return n;
}

START_TEST(a_directory_that_is_made_again_is_used_again)
{
    struct place p;
    char aside[100];
    place_begin(&p);
    for (uint32_t round = 0; round < 4; round++) {
        for (uint64_t i = 0; i < 4; i++)
            ck_assert_int_eq(tier_put(&p.loop, p.t, i, BYTES, NULL), KVD_TIER_OK);
        ck_assert_uint_eq(file_count(&p), 4);
        wait_known(&p, 4);
        kvd_remove_folder(p.path);
        if (round % 2) // by whoever has removed it, or by kvd
            ck_assert_int_eq(mkdir(p.path, 0700), 0);
        if (round > 1) {
            ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_MISS);
            wait_known(&p, 0);
        }
    }
    // One that is put in its place, which is looked for now and then and before it is flushed.
    ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
    snprintf(aside, sizeof(aside), "%s/aside", p.folder);
    ck_assert_int_eq(rename(p.path, aside), 0);
    ck_assert_int_eq(mkdir(p.path, 0700), 0);
    struct answer a = {0};
    kvd_tier_flush(p.t, tier_answered, &a);
    tier_until(&p.loop, &a.n, 1);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 2, BYTES, NULL), KVD_TIER_OK);
    ck_assert_uint_eq(file_count(&p), 1);
    tier_sleep(&p.loop, 50);
    ck_assert_uint_eq(descriptors(&p), 1);
    place_end(&p);
}
END_TEST

START_TEST(a_directory_that_cannot_be_used_is_known_from_the_start)
{
    struct place p;
    struct kvd_tier_status s = {.state = ""};
    char parent[80];
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    snprintf(p.path, sizeof(p.path), "%s/not/there", p.folder);
    place_open(&p);
    for (uint32_t i = 0; i < 1000 && strcmp(s.state, "failing"); i++) {
        tier_sleep(&p.loop, 5);
        kvd_tier_status(p.t, &s);
    }
    ck_assert_str_eq(s.state, "failing");
    ck_assert_ptr_nonnull(strstr(s.why, "No such file"));
    snprintf(parent, sizeof(parent), "%s/not", p.folder);
    ck_assert_int_eq(mkdir(parent, 0700), 0);
    ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK); // is not left alone
    kvd_tier_status(p.t, &s);
    ck_assert_str_eq(s.state, "ok");
    place_end(&p);
}
END_TEST

START_TEST(a_directory_that_cannot_be_used_fails_softly)
{
    struct place p;
    place_begin(&p);
    tier_end(&p.loop, &p.t);
    char good[80];
    strcpy(good, p.path);
    snprintf(p.path, sizeof(p.path), "%s/not/there", p.folder);
    place_open(&p);
    for (uint32_t i = 0; i < 3; i++)
        ck_assert_int_eq(tier_put(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_FAILED);
    uint64_t failed = uv_hrtime();
    enum kvd_tier_result rc = tier_get(&p.loop, p.t, 1, BYTES, NULL);
    ck_assert(rc == KVD_TIER_REFUSED || tier_ms_since(failed) > 400);
    char parent[80];
    snprintf(parent, sizeof(parent), "%s/not", p.folder);
    ck_assert_int_eq(mkdir(parent, 0700), 0); // the disk comes
    for (uint32_t i = 0; i < 10 && rc != KVD_TIER_OK; i++) {
        tier_sleep(&p.loop, 600);
        rc = tier_put(&p.loop, p.t, 1, BYTES, NULL);
    }
    ck_assert_int_eq(rc, KVD_TIER_OK);
    ck_assert_int_eq(tier_get(&p.loop, p.t, 1, BYTES, NULL), KVD_TIER_OK);
    place_end(&p);
}
END_TEST

KVD_MAIN("tier_directory", 60, a_directory_outlives_the_one_that_filled_it,
         files_that_are_not_what_was_written_are_dropped, a_file_of_another_length_is_written_anew,
         a_file_forged_without_the_secret_is_dropped, a_directory_keeps_its_limit_and_what_is_used,
         two_share_a_directory, blocks_expire, a_put_of_what_is_there_renews_its_time,
         a_full_disk_is_noticed, what_cannot_be_dropped_is_told_of,
         a_directory_that_is_made_again_is_used_again,
         a_directory_that_cannot_be_used_is_known_from_the_start,
         a_directory_that_cannot_be_used_fails_softly)

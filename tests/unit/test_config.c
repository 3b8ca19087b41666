// The configuration: what wins over what, what is refused and where, and texts that come back as
// they were.
#include "daemon/core/config.h"
#include "tests/unit/suite.h"

static char folder[] = "/tmp/kvd-config-XXXXXX";

static const char *file(const char *name, const char *text)
{
    static char paths[8][64];
    static uint32_t n;
    char *path = paths[n++ % KVD_LEN(paths)];
    snprintf(path, sizeof(paths[0]), "%s/%s", folder, name);
    FILE *f = fopen(path, "we");
    ck_assert_ptr_nonnull(f);
    fputs(text, f);
    fclose(f);
    return path;
}

static void option(struct kvd_config_source *s, const char *key, const char *value)
{
    s->options[s->n_options].key = key;
    s->options[s->n_options++].value = value;
}

static int load(const struct kvd_config_source *s, struct kvd_config *c, struct kvd_lines *problems)
{
    *problems = (struct kvd_lines){0};
    return kvd_config_load(s, c, problems);
}

START_TEST(later_ones_win)
{
    struct kvd_config c;
    struct kvd_lines problems;
    struct kvd_config_source s = {0};
    ck_assert_int_eq(load(&s, &c, &problems), KVD_OK);
    ck_assert_uint_eq(c.pool_size, 1ull << 30);
    s.files[s.n_files++] =
        file("a.conf", "[kvd]\npool-size = 2GiB\nmax-queue = 100\n[namespace x]\nquota = 1GiB\n");
    s.files[s.n_files++] = file("b.conf", "[kvd]\nmax-queue = 200\ndrain-timeout = 3s\n");
    option(&s, "drain-timeout", "500ms");
    ck_assert_int_eq(load(&s, &c, &problems), KVD_OK);
    ck_assert_uint_eq(c.pool_size, 2ull << 30);
    ck_assert_uint_eq(c.max_queue, 200);
    ck_assert_uint_eq(c.drain_timeout_ms, 500);
    const struct kvd_config_namespace *x = kvd_config_namespace_find(&c, "x");
    ck_assert_ptr_nonnull(x);
    ck_assert_uint_eq(x->quota, 1ull << 30);
    ck_assert_ptr_null(kvd_config_namespace_find(&c, "y"));
}
END_TEST

START_TEST(all_that_is_wrong_is_told_with_its_place)
{
    struct kvd_config c;
    struct kvd_lines problems;
    struct kvd_config_source s = {0};
    s.files[s.n_files++] =
        file("wrong.conf", "[kvd]\npool-size = much\nno-such-key = 1\n\nmax-queue = -4\n");
    option(&s, "device", "first");
    ck_assert_int_eq(load(&s, &c, &problems), KVD_E_INVALID);
    ck_assert_uint_eq(problems.n, 4);
    static const char *const places[] = {"wrong.conf:2", "wrong.conf:3", "wrong.conf:5",
                                         "command line"};
    static const char *const words[] = {"pool-size", "no-such-key", "max-queue", "device"};
    for (uint32_t i = 0; i < problems.n; i++) {
        ck_assert_ptr_nonnull(strstr(problems.line[i], places[i]));
        ck_assert_ptr_nonnull(strstr(problems.line[i], words[i]));
    }
    kvd_lines_free(&problems);
    s = (struct kvd_config_source){.files = {"/no/such/file.conf"}, .n_files = 1};
    ck_assert_int_eq(load(&s, &c, &problems), KVD_E_INVALID);
    ck_assert_ptr_nonnull(strstr(problems.line[0], "/no/such/file.conf"));
    kvd_lines_free(&problems);
}
END_TEST

START_TEST(an_instance_reads_its_own_file_over_the_common_one)
{
    struct kvd_config c;
    struct kvd_lines problems;
    struct kvd_config_source s = {.instance = "2"};
    s.files[s.n_files++] = file("i.conf", "[kvd]\nmax-queue = 100\nmax-sessions = 10\n");
    file("i-2.conf", "[kvd]\nmax-queue = 7\n");
    ck_assert_int_eq(load(&s, &c, &problems), KVD_OK);
    ck_assert_uint_eq(c.max_queue, 7);
    ck_assert_uint_eq(c.max_sessions, 10);
    ck_assert_uint_eq(c.device, 2);
    ck_assert_str_eq(c.metrics, "127.0.0.1:9466");
    ck_assert_str_eq(c.listen[0], "unix:/run/kvd/2/kvd.sock");
    s.instance = "../x";
    ck_assert_int_eq(load(&s, &c, &problems), KVD_E_INVALID);
    ck_assert_ptr_nonnull(strstr(problems.line[0], "--instance"));
    kvd_lines_free(&problems);
}
END_TEST

// Every key's value as text sets the same value again: what --print-config prints can be read.
START_TEST(values_come_back_as_they_were)
{
    struct kvd_config c, again;
    struct kvd_lines problems;
    struct kvd_config_source s = {0};
    char text[16384], value[2400];
    s.files[s.n_files++] =
        file("full.conf", "[kvd]\nlisten = unix:/tmp/a.sock\nlisten = 127.0.0.1:7000\n"
                          "pool-size = 3GiB\nextent-size = 64MiB\nmemory-floor = 1MiB\n"
                          "socket-mode = 0600\nadmin-uid = 3, 4\nreply-timeout = 1500ms\n"
                          "log-level = debug\nstore = /srv/store\n");
    ck_assert_int_eq(load(&s, &c, &problems), KVD_OK);
    const struct kvd_config_key *k;
    FILE *f = fmemopen(text, sizeof(text), "w");
    fputs("[kvd]\n", f);
    for (uint32_t i = 0; (k = kvd_config_key(i)); i++) {
        if (strcmp(k->section, "kvd") != 0 || !kvd_config_value(&c, NULL, i, value, sizeof(value)))
            continue;
        if (strcmp(k->name, "listen") != 0)
            fprintf(f, "%s = %s\n", k->name, value);
        else
            for (uint32_t j = 0; j < c.n_listen; j++)
                fprintf(f, "listen = %s\n", c.listen[j]);
    }
    fclose(f);
    s = (struct kvd_config_source){.files = {file("again.conf", text)}, .n_files = 1};
    int rc = load(&s, &again, &problems);
    ck_assert_msg(rc == KVD_OK, "%s", problems.n ? problems.line[0] : "");
    for (uint32_t i = 0; (k = kvd_config_key(i)); i++) {
        char other[2400];
        if (strcmp(k->section, "namespace") == 0)
            continue;
        kvd_config_value(&c, NULL, i, value, sizeof(value));
        kvd_config_value(&again, NULL, i, other, sizeof(other));
        ck_assert_str_eq(value, other);
    }
}
END_TEST

int main(void)
{
    static const char *const names[] = {"a.conf",   "b.conf",    "wrong.conf", "i.conf",
                                        "i-2.conf", "full.conf", "again.conf"};
    const TTest *const tests[] = {later_ones_win, all_that_is_wrong_is_told_with_its_place,
                                  an_instance_reads_its_own_file_over_the_common_one,
                                  values_come_back_as_they_were};
    char path[64];
    if (!mkdtemp(folder))
        return EXIT_FAILURE;
    int rc = kvd_run_suite("config", tests, KVD_LEN(tests), 30);
    for (size_t i = 0; i < KVD_LEN(names); i++) {
        snprintf(path, sizeof(path), "%s/%s", folder, names[i]);
        unlink(path);
    }
    rmdir(folder);
    return rc;
}

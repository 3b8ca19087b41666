#include "client/kvctl/calib_tool.h"

#include <errno.h>
#include <sys/stat.h>

int tool_fail(const struct kvd_error *err)
{
    char text[KVCTL_TEXT];
    progress_end();
    fprintf(stderr, "kvctl: %s\n", kvctl_text(err->text, text));
    return EXIT_FAILED;
}

int tool_usage(const char *option, const char *value, const char *want)
{
    fprintf(stderr, "kvctl: --%s: '%s' is not possible; it wants %s\n", option, value, want);
    return EXIT_USED_WRONG;
}

uint32_t tool_number(const struct kvctl *k, const char *option, uint32_t otherwise)
{
    const char *value = kvctl_option(k, option);
    return value ? (uint32_t)strtoul(value, NULL, 10) : otherwise;
}

int tool_check_out(const char *path, struct kvd_error *err)
{
    char folder[4096];
    struct stat st;
    const char *name = strrchr(path, '/');
    snprintf(folder, sizeof(folder), "%.*s", name ? (int)KVD_MAX(name - path, 1) : 1,
             name ? path : ".");
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return kvd_fail(err, KVD_E_INVALID, "%s is a folder, and the name of a file is wanted",
                        path);
    if (stat(folder, &st) == 0 && !S_ISDIR(st.st_mode))
        errno = ENOTDIR;
    else if (access(folder, W_OK | X_OK) == 0)
        return KVD_OK;
    return kvd_fail(err, -errno, "%s cannot be written: %s: %s", path, folder, strerror(errno));
}

void tool_progress(void *ctx, uint64_t done, uint64_t total)
{
    progress(ctx, done, total);
}

void tool_progress_count(void *ctx, uint64_t done, uint64_t total)
{
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r%s %llu of %llu\033[K", (const char *)ctx, (unsigned long long)done,
                (unsigned long long)total);
}

const struct command *kvctl_command(size_t i)
{
    return i == 0 ? &kvctl_fit : i == 1 ? &kvctl_eval : NULL;
}

int main(int argc, char **argv)
{
    struct kvctl k = {.argv = argv};
    kvctl_parse(&k, argc, argv);
    return k.command->run(&k);
}

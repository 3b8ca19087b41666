#include "client/kvctl/calib_tool.h"

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

#include "client/kvctl/calib_tool.h"

#include <argp.h>

int tool_fail(const struct kvd_error *err)
{
    progress_end();
    fprintf(stderr, "kvctl: %s\n", err->text);
    return EXIT_FAILED;
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

int main(int argc, char **argv)
{
    // kvctl gives the verb as name; by its own name the verb comes first.
    bool named = strcmp(argv[0], "fit") == 0 || strcmp(argv[0], "eval") == 0;
    if (!named && argc > 1) {
        argc--;
        argv++;
    }
    argp_err_exit_status = EXIT_USED_WRONG;
    if (strcmp(argv[0], "fit") == 0) {
        argv[0] = "kvctl calib fit";
        return fit_main(argc, argv);
    }
    if (strcmp(argv[0], "eval") == 0) {
        argv[0] = "kvctl calib eval";
        return eval_main(argc, argv);
    }
    fprintf(stderr, "kvctl-calib: it is: kvctl calib fit | kvctl calib eval\n");
    return EXIT_USED_WRONG;
}

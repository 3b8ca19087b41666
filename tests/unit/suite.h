// A Check suite with one case per function, and the main that runs it.
#ifndef KVD_TESTS_SUITE_H
#define KVD_TESTS_SUITE_H

#include "proto/base.h"
#include "tests/unit/random.h"

#include <check.h>

// Runs the tests without forking if CK_FORK=no. Returns the process's exit status.
static inline int kvd_run_suite(const char *name, const TTest *const *tests, size_t n,
                                int timeout_s)
{
    Suite *suite = suite_create(name);
    for (size_t i = 0; i < n; i++) {
        TCase *tc = tcase_create(tests[i]->name);
        tcase_set_timeout(tc, timeout_s);
        tcase_add_test(tc, tests[i]);
        suite_add_tcase(suite, tc);
    }
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}

#define KVD_MAIN(name, timeout_s, ...)                                                             \
    int main(void)                                                                                 \
    {                                                                                              \
        const TTest *const tests[] = {__VA_ARGS__};                                                \
        return kvd_run_suite(name, tests, sizeof(tests) / sizeof(tests[0]), timeout_s);            \
    }

#endif

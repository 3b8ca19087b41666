// Files of a test: in a folder of the process's own, which goes when it exits. Check runs each test
// in a process of its own, and a test that fails exits too.
#ifndef KVD_TESTS_SCRATCH_H
#define KVD_TESTS_SCRATCH_H

#include <check.h>
#include <ftw.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static inline int kvd_remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

// Removes a folder with all that is in it.
static inline void kvd_remove_folder(const char *path)
{
    ck_assert_int_eq(nftw(path, kvd_remove_one, 8, FTW_DEPTH | FTW_PHYS), 0);
}

static inline char *kvd_scratch_folder(void)
{
    static char folder[] = "/tmp/kvd-test.XXXXXX";
    return folder;
}

static inline void kvd_scratch_end(void)
{
    nftw(kvd_scratch_folder(), kvd_remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

// The path of a file of that name there. Good until the next call.
static inline const char *kvd_scratch(const char *name)
{
    static char path[256];
    static bool made;
    if (!made) {
        ck_assert_ptr_nonnull(mkdtemp(kvd_scratch_folder()));
        ck_assert_int_eq(atexit(kvd_scratch_end), 0);
        made = true;
    }
    snprintf(path, sizeof(path), "%s/%s", kvd_scratch_folder(), name);
    return path;
}

#endif

// To be preloaded: while the file that SHORT_MEMORY names exists, the program itself (not its
// libraries) gets nothing from calloc that is larger than a few words.
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void *__libc_calloc(size_t n, size_t size);
void *calloc(size_t n, size_t size);

__attribute__((visibility("default"))) void *calloc(size_t n, size_t size)
{
    Dl_info who;
    const char *flag = getenv("SHORT_MEMORY");
    if (n == 1 && size > 256 && flag && access(flag, F_OK) == 0 &&
        dladdr(__builtin_return_address(0), &who) &&
        (strstr(who.dli_fname, "daemon/kvd") || strstr(who.dli_fname, "emulator/kvd"))) {
        errno = ENOMEM;
        return NULL;
    }
    return __libc_calloc(n, size);
}

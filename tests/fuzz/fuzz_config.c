// Configuration files: two of them, divided by a NUL, that are read one over the other.
#include <netdb.h>

#include "daemon/core/config.h"
#include "tests/fuzz/file.h"

// Names are not looked up: nothing may leave this machine.
int __wrap_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                       struct addrinfo **out);
int __real_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                       struct addrinfo **out);

int __wrap_getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                       struct addrinfo **out)
{
    struct addrinfo numeric = *hints;
    numeric.ai_flags |= AI_NUMERICHOST;
    return __real_getaddrinfo(host, service, &numeric, out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct fuzz_file f[2];
    const uint8_t *end = size ? memchr(data, 0, size) : NULL;
    size_t first = end ? (size_t)(end - data) : size;
    for (int i = 0; i < 2; i++)
        fuzz_rewind(&f[i]);
    fuzz_write(&f[0], data, first);
    if (end)
        fuzz_write(&f[1], end + 1, size - first - 1);
    struct kvd_config_source source = {.files = {f[0].path, f[1].path}, .n_files = end ? 2 : 1};
    struct kvd_config *c = calloc(1, sizeof(*c));
    struct kvd_lines problems = {0};
    if (!c)
        return 0;
    int rc = kvd_config_load(&source, c, &problems);
    if ((rc != 0) != (problems.n > 0))
        abort(); // refused without a reason, or taken with one
    for (uint32_t i = 0; rc == 0 && kvd_config_key(i); i++) {
        char text[4096];
        bool of_namespace = strcmp(kvd_config_key(i)->section, "namespace") == 0;
        if (!of_namespace || c->n_namespaces)
            kvd_config_value(c, of_namespace ? &c->namespaces[0] : NULL, i, text, sizeof(text));
    }
    kvd_lines_free(&problems);
    free(c);
    return 0;
}

#include "daemon/core/host.h"

#include <uv.h>

// The limit in a file of a cgroup; UINT64_MAX for "max", or if there is none.
static uint64_t limit_of(const char *folder, const char *file)
{
    char path[4400];
    uint64_t n;
    snprintf(path, sizeof(path), "%s/%s", folder, file);
    FILE *f KVD_FCLOSE = fopen(path, "re");
    return f && fscanf(f, "%" SCNu64, &n) == 1 ? n : UINT64_MAX;
}

// The least limit of a cgroup and of those above it. `folder` is used up.
static uint64_t least_limit(char *folder, size_t root, const char *file)
{
    uint64_t least = limit_of(folder, file);
    for (char *slash; strlen(folder) > root && (slash = strrchr(folder, '/'));) {
        *slash = '\0';
        least = KVD_MIN(least, limit_of(folder, file));
    }
    return least;
}

// Of all hierarchies that this process is in: lines "0::/path" (version 2) and "4:memory:/path".
static uint64_t cgroup_limit(void)
{
    static const char v1[] = "/sys/fs/cgroup/memory", v2[] = "/sys/fs/cgroup";
    char line[4096], folder[4200];
    uint64_t least = UINT64_MAX;
    FILE *f KVD_FCLOSE = fopen("/proc/self/cgroup", "re");
    while (f && fgets(line, sizeof(line), f)) {
        line[strcspn(line, "\n")] = '\0';
        char *name = strchr(line, ':'), *path = name ? strchr(name + 1, ':') : NULL;
        if (!path)
            continue;
        *path++ = '\0';
        bool memory = strcmp(name, ":memory") == 0;
        if (!memory && strcmp(name, ":") != 0)
            continue;
        snprintf(folder, sizeof(folder), "%s%s", memory ? v1 : v2, path);
        uint64_t limit = least_limit(folder, strlen(memory ? v1 : v2),
                                     memory ? "memory.limit_in_bytes" : "memory.max");
        least = KVD_MIN(least, limit);
    }
    return least;
}

uint64_t kvd_host_memory(const char **of)
{
    uint64_t machine = uv_get_total_memory(), group = cgroup_limit();
    *of = group < machine ? "the memory limit of kvd's cgroup (MemoryMax=)"
                          : "the memory of this machine";
    return KVD_MIN(group, machine);
}

// kvctl doctor: what this host gives kvd and its workers, what is missing, and what that means.
//
// It looks with the eyes of whoever calls it, so a worker's user sees a worker's problems. CUDA's
// driver library is loaded if there is one; no context is made.
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <signal.h>

#include "client/kvctl/kvctl.h"

enum level { GOOD, NOTE, WARNING, BAD };
static const char *const level_names[] = {"ok", "note", "warning", "bad"};

struct findings {
    json_t *list; // NULL: lines for people
    enum level worst;
    bool gpu_daemon; // kvd runs on a GPU
    uint32_t pid;    // of kvd
};

// One finding: what was looked at, what was found, and what that means or how to mend it.
__attribute__((format(printf, 5, 6))) static void found(struct findings *f, enum level level,
                                                        const char *what, const char *meaning,
                                                        const char *fmt, ...)
{
    char text[512]; // as an error has
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    if (f->list)
        json_array_append_new(f->list,
                              json_pack("{s:s, s:s, s:o, s:s}", "level", level_names[level], "what",
                                        what, "found", kvctl_text_json(text), "meaning", meaning));
    if (!f->list)
        printf("%-8s %-18s %s\n", level_names[level], what, text);
    if (!f->list && meaning[0])
        printf("%-27s %s\n", "", meaning);
    f->worst = KVD_MAX(f->worst, level);
}

// -- the daemon ---------------------------------------------------------------------------------

static void look_at_socket(const struct kvctl *k, struct findings *f)
{
    const char *address = k->address;
    struct stat st;
    char path[256];
    if (strncmp(address, "unix:", 5) != 0) {
        found(f, NOTE, "fd socket",
              "over TCP sessions are leased: inline data only, no shared "
              "buffers and no direct mode",
              "%s is no unix socket", address);
        return;
    }
    snprintf(path, sizeof(path), "%s.fd", address + 5);
    struct kvd_error err = {0};
    char ticket[33];
    int sock KVD_CLOSE = kvd_fdsock_connect(address, k->timeout_ms, ticket, &err);
    if (sock >= 0 && stat(path, &st) == 0)
        found(f, GOOD, "fd socket", "memory can be shared, and a worker's death is noticed",
              "%s answers (mode %04o, uid %u, gid %u)", path, st.st_mode & 07777, st.st_uid,
              st.st_gid);
    else
        found(f, BAD, "fd socket", "workers of this user cannot open sessions", "%s", err.text);
}

static void look_at_daemon(struct kvctl *k, struct findings *f)
{
    Kvd__V1__StatusRequest req = KVD__V1__STATUS_REQUEST__INIT;
    Kvd__V1__StatusReply *r;
    struct kvd_error err = {0};
    if (kvctl_find(k, &err)) {
        found(f, BAD, "kvd", "start it, or say with --address or --instance where it is", "%s",
              err.text);
        return;
    }
    struct kvd_channel *c = kvctl_channel(k, &err);
    if (!c || kvd_channel_call(c, "/kvd.v1.Admin/GetStatus", &req,
                               &kvd__v1__status_reply__descriptor, k->timeout_ms, &r, &err)) {
        if (err.code == KVD_E_UNAVAILABLE)
            kvctl_no_answer(k, &err);
        found(f, BAD, "kvd",
              err.code == KVD_E_DENIED ? "" : "start it, or say with --address where it is", "%s",
              err.text);
        look_at_socket(k, f);
        return;
    }
    f->gpu_daemon = strcmp(r->backend, "cuda") == 0;
    f->pid = r->pid;
    found(f, GOOD, "kvd", "", "version %s, %s, pid %u", r->version, r->state, r->pid);
    if (f->gpu_daemon)
        found(f, GOOD, "backend", "", "cuda: %s", r->device);
    else
        found(
            f, NOTE, "backend",
            "pages are in host memory. For a GPU: a kvd that was built with CUDA, what is said to "
            "be missing below, and backend = cuda (or auto)",
            "cpu: %s; no GPU: %s", r->device, r->no_gpu);
    kvd__v1__status_reply__free_unpacked(r, NULL);
    look_at_socket(k, f);
}

// -- the GPU ------------------------------------------------------------------------------------

static void look_at_devices(struct findings *f)
{
    int seen = 0, usable = 0;
    DIR *dir = opendir("/dev");
    for (struct dirent *e; dir && (e = readdir(dir));) {
        char path[300];
        snprintf(path, sizeof(path), "/dev/%s", e->d_name);
        if (strncmp(e->d_name, "nvidia", 6) != 0 ||
            (e->d_name[6] && strspn(e->d_name + 6, "0123456789") != strlen(e->d_name + 6) &&
             strcmp(e->d_name, "nvidiactl") != 0 && strcmp(e->d_name, "nvidia-uvm") != 0))
            continue;
        seen++;
        usable += access(path, R_OK | W_OK) == 0;
    }
    if (dir)
        closedir(dir);
    if (seen == 0)
        found(f, f->gpu_daemon ? BAD : NOTE, "GPU devices",
              "no NVIDIA GPU, no driver, or a container without them (docker: --gpus all)",
              "no /dev/nvidia*");
    else if (usable < seen)
        found(f, BAD, "GPU devices", "this user cannot use the GPU: mend the devices' permissions",
              "%d of %d /dev/nvidia* can be opened", usable, seen);
    else
        found(f, GOOD, "GPU devices", "", "%d /dev/nvidia* can be opened", seen);
}

// What doctor needs of the driver's API (cuda.h is not wanted at build time).
struct driver {
    int (*init)(unsigned flags);
    int (*version)(int *version);
    int (*count)(int *n);
    int (*name)(char *name, int len, int device);
    int (*attribute)(int *value, int attribute, int device);
};
enum {
    COMPUTE_MODE = 20,
    CAPABILITY_MAJOR = 75,
    CAPABILITY_MINOR = 76,
    POSIX_FD_SUPPORTED = 103,
    IPC_EVENT_SUPPORTED = 125,
    EXCLUSIVE_PROCESS = 3, // a compute mode
    PROHIBITED = 2,
    DRIVER_WANTED = 12000,
};

static int attribute(const struct driver *d, int which, int device)
{
    int value = 0;
    return d->attribute(&value, which, device) ? -1 : value;
}

static void look_at_gpu(struct findings *f, const struct driver *d, int i, bool mps)
{
    char name[64] = "?", what[32];
    int major = attribute(d, CAPABILITY_MAJOR, i), mode = attribute(d, COMPUTE_MODE, i);
    d->name(name, sizeof(name), i);
    snprintf(what, sizeof(what), "GPU %d", i);
    if (major < 8)
        found(f, WARNING, what, "kvd wants compute capability 8.0 or later and cannot use this one",
              "%s, compute capability %d.%d", name, major, attribute(d, CAPABILITY_MINOR, i));
    else
        found(f, GOOD, what,
              major == 9 ? ""
                         : "kernels are compiled when kvd starts, and are not "
                           "tuned for this one",
              "%s, compute capability %d.%d", name, major, attribute(d, CAPABILITY_MINOR, i));
    if (attribute(d, POSIX_FD_SUPPORTED, i) == 1)
        found(f, GOOD, "shared GPU memory", "direct mode works: pages can be mapped by workers",
              "descriptors of GPU memory are supported");
    else
        found(f, BAD, "shared GPU memory", "no direct mode: kvd cannot lend its pages",
              "descriptors of GPU memory are not supported");
    if (attribute(d, IPC_EVENT_SUPPORTED, i) != 1)
        found(f, NOTE, "IPC events", "workers synchronize their stream before a call",
              "not supported");
    if (mode == PROHIBITED || (mode == EXCLUSIVE_PROCESS && !mps))
        found(f, BAD, "compute mode",
              "kvd and workers cannot share the GPU: start MPS, or nvidia-smi -c DEFAULT", "%s",
              mode == PROHIBITED ? "prohibited" : "exclusive process, without MPS");
    else
        found(f, GOOD, "compute mode", "", "%s",
              mode == EXCLUSIVE_PROCESS ? "exclusive process, with MPS" : "default");
}

// The MPS control daemon that CUDA programs of this user would use.
static bool look_at_mps(struct findings *f)
{
    const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
    char path[256], line[32] = "";
    snprintf(path, sizeof(path), "%s/nvidia-cuda-mps-control.pid",
             folder ? folder : "/tmp/nvidia-mps");
    FILE *file = fopen(path, "re");
    bool there = file && fgets(line, sizeof(line), file) && atoi(line) > 0 &&
                 (kill(atoi(line), 0) == 0 || errno == EPERM);
    if (file)
        fclose(file);
    if (there)
        found(f, GOOD, "MPS",
              "kernels of kvd and workers run side by side; kvd must have the same "
              "CUDA_MPS_PIPE_DIRECTORY. A worker's fault on the GPU ends kvd's work there too",
              "its control daemon runs (pid %d)", atoi(line));
    else if (folder)
        found(f, WARNING, "MPS",
              "CUDA programs with this environment may fail: start "
              "nvidia-cuda-mps-control -d, or unset CUDA_MPS_PIPE_DIRECTORY",
              "%s is set, but nothing runs there", "CUDA_MPS_PIPE_DIRECTORY");
    else
        found(f, NOTE, "MPS",
              "processes take turns on the GPU: calls wait longer beside a busy engine, but faults "
              "stay with who made them. Direct mode hardly cares",
              "not running");
    return there;
}

// Whether kvd was started with the same CUDA_MPS_PIPE_DIRECTORY as this program.
static void look_at_daemons_mps(struct findings *f)
{
    static const char name[] = "CUDA_MPS_PIPE_DIRECTORY=";
    char path[64], text[32768];
    const char *ours = getenv("CUDA_MPS_PIPE_DIRECTORY"), *theirs = "";
    snprintf(path, sizeof(path), "/proc/%u/environ", f->pid);
    FILE *file = f->gpu_daemon ? fopen(path, "re") : NULL;
    if (!file) // another user's, or in another container
        return;
    size_t n = fread(text, 1, sizeof(text) - 1, file);
    fclose(file);
    text[n] = '\0';
    for (const char *at = text; at < text + n; at += strlen(at) + 1)
        if (strncmp(at, name, sizeof(name) - 1) == 0)
            theirs = at + sizeof(name) - 1;
    if (strcmp(theirs, ours ? ours : "") != 0)
        found(f, WARNING, "MPS of kvd",
              "programs of this environment and kvd do not share an MPS server: they take turns on "
              "the GPU",
              "kvd has CUDA_MPS_PIPE_DIRECTORY=%s", theirs[0] ? theirs : "(none)");
}

static void look_at_driver(struct findings *f, bool mps)
{
    char line[160] = "";
    FILE *file = fopen("/proc/driver/nvidia/version", "re");
    if (file && fgets(line, sizeof(line), file)) {
        line[strcspn(line, "\n")] = '\0';
        char *at = strstr(line, "Module");
        found(f, GOOD, "kernel driver", "", "%s", at ? at : line);
    }
    if (file)
        fclose(file);
    void *lib = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        found(f, f->gpu_daemon || line[0] ? BAD : NOTE, "CUDA driver",
              "install the driver's user part (in a container, the NVIDIA runtime brings it)",
              "no libcuda.so.1");
        return;
    }
    struct driver d = {
        .init = (int (*)(unsigned))dlsym(lib, "cuInit"),
        .version = (int (*)(int *))dlsym(lib, "cuDriverGetVersion"),
        .count = (int (*)(int *))dlsym(lib, "cuDeviceGetCount"),
        .name = (int (*)(char *, int, int))dlsym(lib, "cuDeviceGetName"),
        .attribute = (int (*)(int *, int, int))dlsym(lib, "cuDeviceGetAttribute"),
    };
    int version = 0, n = 0, rc = -1;
    if (d.init && d.version && d.count && d.name && d.attribute && d.version(&version) == 0)
        found(f, version >= DRIVER_WANTED ? GOOD : BAD, "CUDA driver",
              version >= DRIVER_WANTED ? "" : "kvd wants 12.0 (driver 525) or later",
              "speaks CUDA %d.%d", version / 1000, version % 1000 / 10);
    if (version)
        rc = d.init(0);
    if (version && (rc || d.count(&n) || n == 0))
        found(f, BAD, "CUDA devices",
              "100: no device; 802: the fabric manager is not ready; 803: driver and library "
              "differ; 999: see dmesg",
              "none usable (CUDA error %d)", rc);
    for (int i = 0; i < n; i++)
        look_at_gpu(f, &d, i, mps);
    dlclose(lib);
}

// -- the host -----------------------------------------------------------------------------------

static void look_at_shm(struct findings *f)
{
    struct statvfs v;
    char size[32];
    if (statvfs("/dev/shm", &v) || access("/dev/shm", W_OK))
        found(f, WARNING, "/dev/shm",
              "CUDA's IPC events and many engines want it; mount a tmpfs there", "%s",
              errno == EACCES || errno == EROFS ? "cannot be written" : "is not there");
    else
        found(f, GOOD, "/dev/shm",
              "to share CUDA's IPC events, workers in containers must see the same one "
              "(docker: --ipc host)",
              "%s free", kvd_format_size(v.f_bavail * v.f_frsize, size, sizeof(size)));
}

static void look_at_memfd(struct findings *f)
{
    int fd KVD_CLOSE = memfd_create("kvctl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        found(f, BAD, "memfd", "no shared buffers: is a seccomp filter in the way?", "%s",
              strerror(errno));
    else if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_FUTURE_WRITE))
        found(f, WARNING, "memfd", "no direct mode on the CPU: it wants Linux 5.1 or later",
              "seals against writing are not supported");
    else
        found(f, GOOD, "memfd", "", "sealed shared memory works");
}

// kvd asks for huge pages, but Linux decides whether shared memory gets any: the word in brackets.
static void look_at_huge_pages(struct findings *f)
{
    static const char path[] = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    char text[128] = "";
    FILE *file = f->gpu_daemon ? NULL : fopen(path, "re");
    if (!file)
        return;
    bool said = fgets(text, sizeof(text), file) != NULL;
    fclose(file);
    char *chosen = said ? strchr(text, '[') : NULL, *end = chosen ? strchr(chosen, ']') : NULL;
    if (!end)
        return;
    *end = '\0';
    chosen++;
    bool none = strcmp(chosen, "never") == 0 || strcmp(chosen, "deny") == 0;
    found(f, none ? NOTE : GOOD, "huge pages",
          none
              ? "attention on the CPU is slower by 5 to 40 %: write advise there and start kvd anew"
              : "",
          "%s is %s", path, chosen);
}

static void look_at_limits(struct findings *f)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0)
        found(f, r.rlim_max < 4096 ? WARNING : GOOD, "open files",
              r.rlim_max < 4096 ? "few: kvd takes one for each connection, buffer and extent" : "",
              "%llu, at most %llu", (unsigned long long)r.rlim_cur, (unsigned long long)r.rlim_max);
}

int cmd_doctor(struct kvctl *k)
{
    struct findings f = {.list = k->json ? json_array() : NULL};
    look_at_daemon(k, &f);
    look_at_devices(&f);
    bool mps = look_at_mps(&f);
    look_at_daemons_mps(&f);
    look_at_driver(&f, mps);
    look_at_shm(&f);
    look_at_memfd(&f);
    look_at_huge_pages(&f);
    look_at_limits(&f);
    if (f.list)
        kvctl_print(k, f.list);
    return f.worst == BAD ? EXIT_FAILED : EXIT_OK;
}

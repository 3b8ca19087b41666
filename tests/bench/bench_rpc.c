// gRPC round trips between processes. usage: bench_rpc ADDRESS SECONDS CLIENTS
// Each client is a process with its own channel, calling Admin.Ping one call at a time; prints p50,
// p99 and calls/s.
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#include "admin.pb-c.h"
#include "client/lib/channel.h"

enum { BUCKETS = 100000 }; // of a microsecond

struct shared {
    uint64_t calls[64], cpu_us[64];
    uint32_t histogram[64][BUCKETS];
};

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

static void client(const char *address, double seconds, struct shared *s, int me)
{
    struct kvd_error err = {0};
    struct kvd_channel *c =
        kvd_channel_new(&(struct kvd_channel_options){.address = address}, &err);
    Kvd__V1__PingRequest req = KVD__V1__PING_REQUEST__INIT;
    double warm = now() + 0.3, end = warm + seconds;
    for (double t = now(); t < end;) {
        Kvd__V1__PingReply *r;
        if (kvd_channel_call(c, "/kvd.v1.Admin/Ping", &req, &kvd__v1__ping_reply__descriptor, 5000,
                             &r, &err)) {
            fprintf(stderr, "bench_rpc: %s\n", err.text);
            _exit(1);
        }
        kvd__v1__ping_reply__free_unpacked(r, NULL);
        double after = now();
        if (t > warm) {
            int us = (int)((after - t) * 1e6);
            s->histogram[me][us < BUCKETS ? us : BUCKETS - 1]++;
            s->calls[me]++;
        }
        t = after;
    }
    struct rusage ru;
    getrusage(RUSAGE_SELF, &ru);
    s->cpu_us[me] = (uint64_t)(ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) * 1000000 +
                    (uint64_t)(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec);
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    double seconds = atof(argv[2]);
    int n = KVD_MIN(atoi(argv[3]), 64);
    struct shared *s =
        mmap(NULL, sizeof(*s), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < n; i++)
        if (fork() == 0)
            client(argv[1], seconds, s, i);
    for (int i = 0; i < n; i++)
        wait(NULL);
    uint64_t calls = 0, cpu = 0, seen = 0;
    int p50 = -1, p99 = -1;
    for (int i = 0; i < n; i++) {
        calls += s->calls[i];
        cpu += s->cpu_us[i];
    }
    for (int us = 0; us < BUCKETS; us++) {
        for (int i = 0; i < n; i++)
            seen += s->histogram[i][us];
        if (p50 < 0 && seen * 2 >= calls)
            p50 = us;
        if (p99 < 0 && seen * 100 >= calls * 99)
            p99 = us;
    }
    printf("%d client%s  p50 %4d us  p99 %5d us  %7.0f calls/s  client CPU %5.1f us a call\n", n,
           n > 1 ? "s" : " ", p50, p99, (double)calls / seconds,
           (double)cpu / (double)(calls ? calls : 1));
    return calls ? 0 : 1;
}

// Counters and histograms of the daemon, and the Prometheus text that each part renders its own in.
// Names follow its conventions: base units, _total for counters, kvd_ in front. Loop thread.
#ifndef KVD_DAEMON_METRICS_H
#define KVD_DAEMON_METRICS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { KVD_BUCKETS = 16, KVD_MAX_METHODS = 56, KVD_GRPC_CODES = 17 };

struct kvd_histogram {
    uint64_t bucket[KVD_BUCKETS + 1]; // the last is +Inf
    uint64_t count, sum_ns;
};

// How old what was evicted was: seconds to a week.
enum { KVD_AGES = 10 };
struct kvd_ages {
    uint64_t bucket[KVD_AGES + 1]; // the last is +Inf
    uint64_t count, sum_s;
};

enum kvd_kernel_op {
    KVD_OP_APPEND,
    KVD_OP_ATTEND,
    KVD_OP_STEP,
    KVD_OP_ROTATE,
    KVD_OP_READ,
    KVD_OP_PUT,
    KVD_OP_GET,
    KVD_OP_ENCODE,
    KVD_OP_COUNT,
    KVD_OP_MAP, // runs no kernel
};

// Why a call was refused for want of room: labels of kvd_refused_calls_total.
enum kvd_refusal {
    KVD_REFUSED_POOL,  // no KV memory that could be had
    KVD_REFUSED_QUOTA, // of the namespace
    KVD_REFUSED_LIMIT, // of the daemon: see max- keys
    KVD_REFUSED_COUNT,
};

struct kvd_metrics {
    struct kvd_histogram rpc[KVD_MAX_METHODS];
    uint64_t calls[KVD_MAX_METHODS][KVD_GRPC_CODES];
    struct kvd_histogram queue_wait, kernel[KVD_OP_COUNT];
    uint64_t sessions_opened, sessions_ended, leases_expired, sessions_resumed;
    uint64_t sessions_kept, sequences_kept; // of the kvd before
    uint64_t sessions_lost, sequences_lost;
    uint64_t tokens_appended, tokens_beyond_fit, queries_attended;
    uint64_t bytes_in, bytes_stored; // bf16 bytes that were demoted, and what they became
    uint64_t rotations_loaded, rotations_cached, rotations_fetched, rotations_failed;
    uint64_t nonfinite, events_lost;
    uint64_t refused[KVD_REFUSED_COUNT];
};

void kvd_histogram_add(struct kvd_histogram *h, uint64_t ns);
void kvd_ages_add(struct kvd_ages *a, uint64_t s);
// Calls answered, of all methods and with whatever code.
uint64_t kvd_metrics_calls(const struct kvd_metrics *m);

// The lines before a metric's samples. type: "gauge", "counter" or "histogram".
void kvd_metric_head(FILE *f, const char *name, const char *type, const char *help);
// A metric of one sample, without labels.
void kvd_metric(FILE *f, const char *name, const char *type, const char *help, double value);
// The samples of a histogram. labels: "" or `a="b"`.
void kvd_metric_histogram(FILE *f, const char *name, const char *labels,
                          const struct kvd_histogram *h);
void kvd_metric_ages(FILE *f, const char *name, const char *labels, const struct kvd_ages *a);
// A label's value: backslash, quote and newline escaped.
void kvd_metric_escape(const char *in, char *out, size_t cap);

#endif

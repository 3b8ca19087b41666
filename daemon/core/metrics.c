#include "daemon/core/metrics.h"

#include "proto/base.h"

// Upper bounds in nanoseconds: 25 us to about 10 s.
static const uint64_t bounds[KVD_BUCKETS] = {
    25000,   50000,    100000,   200000,    400000,    800000,     1600000,    3200000,
    6400000, 12800000, 25600000, 100000000, 400000000, 1600000000, 4000000000, 10000000000,
};

// Upper bounds in seconds.
static const uint64_t ages[KVD_AGES] = {1, 10, 60, 300, 900, 3600, 14400, 43200, 86400, 604800};

void kvd_histogram_add(struct kvd_histogram *h, uint64_t ns)
{
    int i = 0;
    while (i < KVD_BUCKETS && ns > bounds[i])
        i++;
    h->bucket[i]++;
    h->count++;
    h->sum_ns += ns;
}

void kvd_ages_add(struct kvd_ages *a, uint64_t s)
{
    int i = 0;
    while (i < KVD_AGES && s > ages[i])
        i++;
    a->bucket[i]++;
    a->count++;
    a->sum_s += s;
}

uint64_t kvd_metrics_calls(const struct kvd_metrics *m)
{
    uint64_t sum = 0;
    for (int i = 0; i < KVD_MAX_METHODS; i++)
        for (int c = 0; c < KVD_GRPC_CODES; c++)
            sum += m->calls[i][c];
    return sum;
}

void kvd_metric_head(FILE *f, const char *name, const char *type, const char *help)
{
    fprintf(f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

void kvd_metric(FILE *f, const char *name, const char *type, const char *help, double value)
{
    kvd_metric_head(f, name, type, help);
    fprintf(f, "%s %.17g\n", name, value);
}

// n buckets with `upper` bounds, in parts of which `per_s` are a second, and one beyond.
static void histogram(FILE *f, const char *name, const char *labels, const uint64_t *upper, int n,
                      double per_s, const uint64_t *bucket, uint64_t total, double sum_s)
{
    uint64_t sum = 0;
    const char *comma = *labels ? "," : "";
    for (int i = 0; i < n; i++) {
        sum += bucket[i];
        fprintf(f, "%s_bucket{%s%sle=\"%g\"} %" PRIu64 "\n", name, labels, comma,
                (double)upper[i] / per_s, sum);
    }
    fprintf(f, "%s_bucket{%s%sle=\"+Inf\"} %" PRIu64 "\n", name, labels, comma, total);
    const char *open = *labels ? "{" : "", *close = *labels ? "}" : "";
    fprintf(f, "%s_sum%s%s%s %.9f\n", name, open, labels, close, sum_s);
    fprintf(f, "%s_count%s%s%s %" PRIu64 "\n", name, open, labels, close, total);
}

void kvd_metric_histogram(FILE *f, const char *name, const char *labels,
                          const struct kvd_histogram *h)
{
    histogram(f, name, labels, bounds, KVD_BUCKETS, 1e9, h->bucket, h->count,
              (double)h->sum_ns / 1e9);
}

void kvd_metric_ages(FILE *f, const char *name, const char *labels, const struct kvd_ages *a)
{
    histogram(f, name, labels, ages, KVD_AGES, 1, a->bucket, a->count, (double)a->sum_s);
}

void kvd_metric_escape(const char *in, char *out, size_t cap)
{
    size_t n = 0;
    for (; *in && n + 3 < cap; in++) {
        if (*in == '\\' || *in == '"')
            out[n++] = '\\';
        out[n++] = *in;
    }
    out[n] = '\0';
}

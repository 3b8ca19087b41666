#include "daemon/service/restore_counts.h"

void kvd_restore_counts_metrics(const struct kvd_daemon *d, FILE *f,
                                const struct kvd_restore_counts *c, double running)
{
    kvd_metric_head(f, "kvd_restored_blocks_total", "counter",
                    "Blocks that were brought back from a tier, by the farthest that had part.");
    for (uint32_t i = 0; i < kvd_tiers_count(d); i++)
        fprintf(f, "kvd_restored_blocks_total{tier=\"%s\"} %" PRIu64 "\n",
                kvd_tier_name(kvd_tiers_get_tier(d, i)), c->blocks[i]);
    kvd_metric(f, "kvd_restored_bytes_total", "counter", "Bytes of them.", (double)c->bytes);
    kvd_metric(f, "kvd_restore_missed_blocks_total", "counter",
               "Blocks that a tier said it has, and that did not come or did not verify.",
               (double)c->missed);
    kvd_metric(f, "kvd_restore_followed_total", "counter",
               "Times that a call waited for another that was bringing back the same blocks.",
               (double)c->followed);
    kvd_metric(f, "kvd_restores_running", "gauge",
               "Prompts whose blocks are looked for in tiers; of pages, calls.", running);
    kvd_metric_head(f, "kvd_restore_seconds", "histogram",
                    "Time from looking for a prompt's blocks in tiers to having them back.");
    kvd_metric_histogram(f, "kvd_restore_seconds", "", &c->seconds);
    kvd_metric(f, "kvd_restore_copies_total", "counter",
               "Copies that were made of them: blocks that lie at equal distances are one.",
               (double)c->copies);
    kvd_metric_head(f, "kvd_restore_phase_seconds_total", "counter",
                    "Of that, time of looking, of copying, and of waiting for tiers with nothing "
                    "to copy, or for others; pages of one call are brought back in parts, whose "
                    "times are added up.");
    const struct {
        const char *name;
        uint64_t ns;
    } phases[] = {{"looks", c->looks_ns}, {"copies", c->copies_ns}, {"waits", c->waits_ns}};
    for (size_t i = 0; i < KVD_LEN(phases); i++)
        fprintf(f, "kvd_restore_phase_seconds_total{phase=\"%s\"} %.6f\n", phases[i].name,
                (double)phases[i].ns / 1e9);
}

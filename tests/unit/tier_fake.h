// A back end of a tier that does as it is told, for tests of the front.
#ifndef KVD_TESTS_TIER_FAKE_H
#define KVD_TESTS_TIER_FAKE_H

#include "daemon/tier/backend.h"
#include "tests/unit/suite.h"

struct fake {
    struct kvd_tier_op *ops[64]; // that it holds
    uint32_t n, submitted;
    bool hold;
    enum kvd_tier_result result;
};

static inline void fake_submit(void *state, struct kvd_tier_op *op)
{
    struct fake *f = state;
    f->submitted++;
    if (f->hold)
        f->ops[f->n++] = op;
    else if (f->result == KVD_TIER_OK && op->verb == KVD_TIER_GET)
        kvd_tier_finish(op, KVD_TIER_MISS);
    else
        kvd_tier_fail(op, f->result, "as told");
}

static inline void fake_release(struct fake *f)
{
    while (f->n)
        kvd_tier_finish(f->ops[--f->n], f->result);
}

static inline bool fake_close(void *state, const struct timespec *deadline)
{
    struct fake *f = state;
    (void)deadline;
    return f->n == 0; // as one whose thread hangs
}

static inline void fake_status(void *state, struct kvd_tier_status *out)
{
    (void)state;
    (void)out;
}

static const struct kvd_tier_ops fake_ops = {.name = "fake",
                                             .most_running = 4,
                                             .submit = fake_submit,
                                             .close = fake_close,
                                             .status = fake_status};

#endif

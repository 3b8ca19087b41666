#include "daemon/sched/superseded.h"

#include "daemon/sched/page_counts.h"

enum {
    GONE_MS = 100, // from when a block has gone: many do at once, and few are those that stand in
    NEXT_MS = 1,
    LOOKED_AT = 256, // at once
    MOST = 1 << 16,
};

// Is looked through, from the beginning to the end, when one of them may have ended.
struct kvd_superseded_list {
    uv_timer_t timer; // runs while `left`
    struct kvd_superseded *items;
    uint32_t n, room, at, left; // left: to be looked at
};

// Whether it needs to be looked at no more.
static bool ends(struct kvd_daemon *d, const struct kvd_superseded *page)
{
    uint32_t ns = page->spaces[0].ns, entry;
    uint64_t freed;
    kvd_blocks_find_pages(d->pool, &page->spaces[0], false, &page->keys[0], 1, &entry);
    bool over = kvd_blocks_end_superseded(d->pool, &page->spaces[1], &page->keys[1],
                                          entry != KVD_PREFIX_NONE, &freed);
    if (freed)
        kvd_page_count_of(d, ns)->freed += freed;
    return over;
}

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_superseded_list *l = d->superseded;
    for (uint32_t i = 0; i < LOOKED_AT && l->n && l->left; i++, l->left--) {
        l->at = l->at < l->n ? l->at : 0;
        if (ends(d, &l->items[l->at]))
            l->items[l->at] = l->items[--l->n];
        else
            l->at++;
    }
    if (l->left && l->n)
        uv_timer_start(timer, on_timer, NEXT_MS, 0);
}

// Not at once: this is told while the pool is being changed.
static void superseded_over(struct kvd_daemon *d)
{
    struct kvd_superseded_list *l = d->superseded;
    if (!l || !l->n)
        return;
    l->left = l->n;
    uv_timer_start(&l->timer, on_timer, 0, 0);
}

// It may have been the encoded page of one, which is to count again.
static void block_gone(struct kvd_daemon *d, uint32_t ns, uint32_t layout,
                       const struct kvd_prefix_removed *removed)
{
    struct kvd_superseded_list *l = d->superseded;
    (void)ns;
    (void)layout;
    (void)removed;
    if (!l || !l->n)
        return;
    l->left = l->n;
    if (!uv_is_active((uv_handle_t *)&l->timer))
        uv_timer_start(&l->timer, on_timer, GONE_MS, 0);
}

// False: memory is short, or there are too many.
static bool grow(struct kvd_superseded_list *l)
{
    uint32_t room = KVD_MAX(2 * l->room, 64u);
    if (l->n < l->room)
        return true;
    if (room > MOST)
        return false;
    struct kvd_superseded *more = realloc(l->items, room * sizeof(*more));
    if (!more)
        return false;
    l->items = more;
    l->room = room;
    return true;
}

void kvd_superseded_note(struct kvd_daemon *d, const struct kvd_superseded *page)
{
    struct kvd_superseded_list *l = d->superseded;
    uint64_t freed;
    if (!grow(l)) {
        kvd_blocks_end_superseded(d->pool, &page->spaces[1], &page->keys[1], false, &freed);
        return;
    }
    l->items[l->n++] = *page;
}

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->superseded = calloc(1, sizeof(*d->superseded));
    if (!d->superseded)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->superseded->timer);
    d->superseded->timer.data = d;
    return KVD_OK;
}

static void end(struct kvd_daemon *d)
{
    if (d->superseded)
        uv_close((uv_handle_t *)&d->superseded->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    if (d->superseded)
        free(d->superseded->items);
    free(KVD_TAKE(d->superseded));
}

static void metrics(struct kvd_daemon *d, FILE *f)
{
    kvd_metric(f, "kvd_pages_superseded", "gauge",
               "Exact pages that leases keep beside the encoded ones that lookups find.",
               d->superseded->n);
}

const struct kvd_part kvd_part_exact = {.init = init,
                                        .end = end,
                                        .deinit = deinit,
                                        .block_gone = block_gone,
                                        .superseded_over = superseded_over,
                                        .metrics = metrics};

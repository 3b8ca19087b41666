#include "daemon/sched/superseded.h"

#include "daemon/sched/page_counts.h"

enum {
    AGAIN_MS = 100, // between looks
    LOOKED_AT = 256,
    MOST = 1 << 16,
};

struct kvd_superseded_list {
    uv_timer_t timer; // runs while there are some
    struct kvd_superseded *items;
    uint32_t n, room, at;
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
    for (uint32_t i = 0; i < LOOKED_AT && l->n; i++) {
        l->at = l->at < l->n ? l->at : 0;
        if (ends(d, &l->items[l->at]))
            l->items[l->at] = l->items[--l->n];
        else
            l->at++;
    }
    if (!l->n)
        uv_timer_stop(timer);
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
    if (!uv_is_active((uv_handle_t *)&l->timer))
        uv_timer_start(&l->timer, on_timer, AGAIN_MS, AGAIN_MS);
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

const struct kvd_part kvd_part_exact = {
    .init = init, .end = end, .deinit = deinit, .metrics = metrics};

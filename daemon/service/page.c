#include "daemon/service/page.h"

#include <utlist.h>
#include <uv.h>

#include "admin.pb-c.h"
#include "daemon/rpc/rpc.h"
#include "daemon/service/handlers.h"
#include "daemon/service/steps.h"

char *kvd_metrics_page(struct kvd_daemon *d)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return NULL;
    for (const struct kvd_part *const *p = d->parts; *p; p++)
        if ((*p)->metrics)
            (*p)->metrics(d, f);
    if (fclose(f)) {
        free(text);
        return NULL;
    }
    return text;
}

// -- GetMetrics ---------------------------------------------------------------------------------
//
// Anybody may ask, and with hundreds of namespaces a page takes long. So one is made for all who
// ask, part by part, and the next one for all who have come meanwhile, so that nobody is told what
// was before he asked.

enum { PAUSE_MS = 50 }; // from one page's beginning to the next one's

struct page;

struct asking {
    struct kvd_call *call;
    struct page *page; // that is made for it; NULL: it waits for the next one
    struct asking *prev, *next;
};

struct page {
    struct kvd_stepped stepped; // first
    struct asking *asking;
    const struct kvd_part *const *part; // whose turn it is
    FILE *f;                            // NULL: all of them have had it
    char *text;
    size_t size, length;
    uint8_t *packed;
    struct kvd_error err;
};

struct kvd_metrics_pages {
    uv_timer_t timer; // runs while some wait and none is made
    struct asking *waiting;
    struct page *page; // that is being made; NULL: none
    uint64_t next_ms;  // not before
};

static void on_timer(uv_timer_t *timer);

static void want_page(struct kvd_daemon *d)
{
    struct kvd_metrics_pages *all = d->metrics_pages;
    uint64_t now = kvd_now_ms(d);
    if (!all->page && all->waiting && !uv_is_active((uv_handle_t *)&all->timer))
        uv_timer_start(&all->timer, on_timer, all->next_ms > now ? all->next_ms - now : 0, 0);
}

static void page_free(struct kvd_daemon *d, struct page *p)
{
    kvd_steps_drop(d, &p->stepped);
    d->metrics_pages->page = NULL;
    if (p->f)
        fclose(p->f);
    free(p->text);
    free(p->packed);
    free(p);
}

// The reply, once for all. It is as long as `packed` says.
static void pack(struct page *p)
{
    Kvd__V1__GetMetricsReply r = KVD__V1__GET_METRICS_REPLY__INIT;
    bool good = fclose(KVD_TAKE(p->f)) == 0 && p->text;
    r.text = p->text;
    if (good) {
        p->length = kvd__v1__get_metrics_reply__get_packed_size(&r);
        p->packed = malloc(p->length + 1);
    }
    if (p->packed)
        kvd__v1__get_metrics_reply__pack(&r, p->packed);
    else
        kvd_fail(&p->err, KVD_E_INTERNAL, "out of memory");
}

// One, as a page may be megabytes, which are copied for each.
static void answer_one(struct page *p)
{
    struct asking *a = p->asking;
    DL_DELETE(p->asking, a);
    a->call->on_cancelled = NULL;
    if (p->packed)
        kvd_call_reply_packed(a->call, p->packed, p->length);
    else
        kvd_call_fail_error(a->call, &p->err);
    free(a);
}

static void step(struct kvd_daemon *d, struct kvd_stepped *s)
{
    struct page *p = (struct page *)s;
    while (*p->part && !(*p->part)->metrics)
        p->part++;
    if (*p->part && p->asking) {
        (*p->part++)->metrics(d, p->f);
        return;
    }
    if (p->f)
        pack(p);
    if (p->asking)
        answer_one(p);
    if (p->asking)
        return;
    page_free(d, p);
    want_page(d);
}

static void on_timer(uv_timer_t *timer)
{
    struct kvd_daemon *d = timer->data;
    struct kvd_metrics_pages *all = d->metrics_pages;
    struct page *p = calloc(1, sizeof(*p));
    struct asking *a, *tmp;
    if (p && (p->f = open_memstream(&p->text, &p->size)) == NULL)
        free(KVD_TAKE(p));
    all->next_ms = kvd_now_ms(d) + PAUSE_MS;
    DL_FOREACH_SAFE(all->waiting, a, tmp)
    {
        DL_DELETE(all->waiting, a);
        a->page = p;
        if (p) {
            DL_APPEND(p->asking, a);
            continue;
        }
        a->call->on_cancelled = NULL;
        kvd_call_fail(a->call, KVD_E_INTERNAL, "out of memory");
        free(a);
    }
    if (!p)
        return;
    p->stepped.step = step;
    p->part = d->parts;
    all->page = p;
    kvd_steps_begin(d, &p->stepped, 0, 0);
}

// A page for nobody ends at its next step.
static void on_cancelled(struct kvd_call *call)
{
    struct kvd_metrics_pages *all = call->d->metrics_pages;
    struct asking *a = call->work;
    if (a->page)
        DL_DELETE(a->page->asking, a);
    else
        DL_DELETE(all->waiting, a);
    free(a);
    if (!all->waiting)
        uv_timer_stop(&all->timer);
    kvd_call_fail(call, KVD_E_UNAVAILABLE, "the call was cancelled");
}

void kvd_on_get_metrics(struct kvd_call *call, const void *request)
{
    (void)request;
    struct kvd_metrics_pages *all = call->d->metrics_pages;
    struct asking *a = calloc(1, sizeof(*a));
    if (!a) {
        kvd_call_fail(call, KVD_E_INTERNAL, "out of memory");
        return;
    }
    a->call = call;
    call->work = a;
    call->on_cancelled = on_cancelled;
    DL_APPEND(all->waiting, a);
    want_page(call->d);
}

// -- start and end ------------------------------------------------------------------------------

static int init(struct kvd_daemon *d, struct kvd_error *err)
{
    d->metrics_pages = calloc(1, sizeof(*d->metrics_pages));
    if (!d->metrics_pages)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    uv_timer_init(&d->loop, &d->metrics_pages->timer);
    d->metrics_pages->timer.data = d;
    return KVD_OK;
}

// No call is left by then.
static void end(struct kvd_daemon *d)
{
    if (d->metrics_pages)
        uv_close((uv_handle_t *)&d->metrics_pages->timer, NULL);
}

static void deinit(struct kvd_daemon *d)
{
    free(KVD_TAKE(d->metrics_pages));
}

const struct kvd_part kvd_part_page = {.init = init, .end = end, .deinit = deinit};

#include "daemon/session/ledger.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define MAGIC   0x52474445444c564bull // "KVLDEDGR"
#define VERSION 1                     // of what this file describes

struct head {
    uint64_t magic;
    uint32_t version, shape; // of the structs below, in case that the version was forgotten
    uint32_t max_sessions, max_holds;
    uint64_t next_id, restarts;
    uint32_t n_sessions, n_holds; // of the records, used at least once
};

struct session {
    uint64_t used; // 1: there is one
    struct kvd_ledger_session is;
    uint64_t batches; // calls that have made holds
    uint64_t making;  // the one that is not true yet; 0: none
    uint64_t freeing[KVD_LEDGER_FREEING];
    // Of the replies: where the first begins and the last ends, in bytes since the session began.
    uint64_t begin, end;
    uint8_t replies[KVD_LEDGER_REPLIES];
};

// What stands before a reply. Both are rounded up to 8 bytes.
struct reply {
    uint64_t request, method, batch, length;
};

// What changes as one.
union count {
    uint64_t all;
    struct {
        uint16_t holds;  // 0: there is no such record
        uint16_t before; // what they were before the latest call that made some
        uint32_t by;     // the mark of the request that last released some; 0: none that counts
    } is;
};

struct hold {
    uint64_t seq;
    uint64_t batch; // of the latest call that made some
    uint64_t owner; // the session's id
    uint32_t session;
    uint32_t next; // of a free record: the next free one; each process makes that anew
    union count n;
};

struct kvd_ledger {
    int fd;
    struct head *head;
    struct session *session;
    struct hold *hold;
    size_t bytes;
    uint32_t free_hold;
    uint32_t *free_session; // numbers of free records
    uint32_t n_free;
};

// What stands before it is in memory before what stands behind it.
#ifdef KVD_LEDGER_KILL_POINTS
extern void (*kvd_ledger_kill_point)(void); // a test looks at the ledger as it is there
#endif
static void stored(void)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#ifdef KVD_LEDGER_KILL_POINTS
    if (kvd_ledger_kill_point)
        kvd_ledger_kill_point();
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
#endif
}

// -- the memory ---------------------------------------------------------------------------------

static uint32_t shape(void)
{
    return (uint32_t)(sizeof(struct head) + 64 * sizeof(struct session) +
                      (1 << 20) * sizeof(struct hold) + 8 * offsetof(struct session, replies));
}

static struct kvd_ledger *map(int fd, uint32_t max_sessions, uint32_t max_holds,
                              struct kvd_error *err)
{
    struct kvd_ledger *l = calloc(1, sizeof(*l));
    uint32_t *free_session = calloc(max_sessions, sizeof(*free_session));
    size_t sessions = kvd_round_up(sizeof(struct head), 4096);
    size_t holds = sessions + max_sessions * sizeof(struct session);
    size_t bytes = kvd_round_up(holds + max_holds * sizeof(struct hold), 4096);
    struct stat st;
    void *base = MAP_FAILED;
    if (!free_session)
        free(KVD_TAKE(l));
    if (l && fd < 0)
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    else if (l && fstat(fd, &st) == 0 && st.st_size == 0 && ftruncate(fd, (off_t)bytes))
        kvd_fail(err, KVD_E_INTERNAL, "cannot make the ledger of sessions: %s", strerror(errno));
    else if (l && fstat(fd, &st) == 0 && (uint64_t)st.st_size != bytes)
        kvd_fail(err, KVD_E_CORRUPT, "the ledger of sessions has %lld bytes, not %zu",
                 (long long)st.st_size, bytes);
    else if (l)
        base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (base == MAP_FAILED) {
        free(free_session);
        free(l);
        if (!err->code)
            kvd_fail(err, KVD_E_INTERNAL, "cannot map the ledger of sessions: %s", strerror(errno));
        return NULL;
    }
    *l = (struct kvd_ledger){.fd = fd,
                             .head = base,
                             .session = (struct session *)((uint8_t *)base + sessions),
                             .hold = (struct hold *)((uint8_t *)base + holds),
                             .bytes = bytes,
                             .free_hold = KVD_LEDGER_NONE,
                             .free_session = free_session};
    return l;
}

static struct kvd_ledger *begin(int fd, uint32_t max_sessions, uint32_t max_holds,
                                struct kvd_error *err)
{
    struct kvd_ledger *l = map(fd, max_sessions, max_holds, err);
    if (!l)
        return NULL;
    *l->head = (struct head){
        .version = VERSION, .shape = shape(), .max_sessions = max_sessions, .max_holds = max_holds};
    stored();
    l->head->magic = MAGIC;
    stored();
    return l;
}

struct kvd_ledger *kvd_ledger_new(uint32_t max_sessions, uint32_t max_holds, struct kvd_error *err)
{
    int fd KVD_CLOSE = memfd_create("kvd-sessions", MFD_CLOEXEC);
    if (fd < 0) {
        kvd_fail(err, KVD_E_INTERNAL, "cannot make the ledger of sessions: %s", strerror(errno));
        return NULL;
    }
    struct kvd_ledger *l = begin(fd, max_sessions, max_holds, err);
    if (l)
        (void)KVD_TAKE_FD(fd);
    return l;
}

struct kvd_ledger *kvd_ledger_private(uint32_t max_sessions, uint32_t max_holds,
                                      struct kvd_error *err)
{
    return begin(-1, max_sessions, max_holds, err);
}

void kvd_ledger_close(struct kvd_ledger **lp)
{
    struct kvd_ledger *l = KVD_TAKE(*lp);
    if (!l)
        return;
    munmap(l->head, l->bytes);
    if (l->fd >= 0)
        close(l->fd);
    free(l->free_session);
    free(l);
}

int kvd_ledger_fd(const struct kvd_ledger *l)
{
    return l->fd;
}

uint64_t kvd_ledger_restarts(const struct kvd_ledger *l)
{
    return l->head->restarts;
}

// -- replies ------------------------------------------------------------------------------------

static uint64_t reply_bytes(uint64_t length)
{
    return sizeof(struct reply) + kvd_round_up(length, sizeof(uint64_t));
}

static void ring_write(struct session *s, uint64_t at, const void *data, size_t n)
{
    size_t from = at % KVD_LEDGER_REPLIES, first = KVD_MIN(n, KVD_LEDGER_REPLIES - from);
    memcpy(s->replies + from, data, first);
    memcpy(s->replies, (const uint8_t *)data + first, n - first);
}

static void ring_read(const struct session *s, uint64_t at, void *data, size_t n)
{
    size_t from = at % KVD_LEDGER_REPLIES, first = KVD_MIN(n, KVD_LEDGER_REPLIES - from);
    memcpy(data, s->replies + from, first);
    memcpy((uint8_t *)data + first, s->replies, n - first);
}

void kvd_ledger_commit(struct kvd_ledger *l, uint32_t session)
{
    l->session[session].making = 0;
    stored();
}

void kvd_ledger_remember(struct kvd_ledger *l, uint32_t session, uint64_t request, uint64_t method,
                         const void *reply, size_t length)
{
    struct session *s = &l->session[session];
    struct reply head = {request, method, s->making, length};
    uint64_t bytes = reply_bytes(length);
    if (request && length <= KVD_LEDGER_REPLIES && bytes <= KVD_LEDGER_REPLIES) {
        while (s->end + bytes - s->begin > KVD_LEDGER_REPLIES) {
            struct reply oldest;
            ring_read(s, s->begin, &oldest, sizeof(oldest));
            s->begin += reply_bytes(oldest.length);
            stored();
        }
        ring_write(s, s->end, &head, sizeof(head));
        ring_write(s, s->end + sizeof(head), reply, length);
        stored();
        s->end += bytes; // with this it is true, and so is what the call has made
        stored();
    }
    for (size_t i = 0; i < KVD_LEN(s->freeing) && request; i++)
        if (s->freeing[i] == request)
            s->freeing[i] = 0;
    kvd_ledger_commit(l, session);
}

// Where the reply to a request is, or `end`.
static uint64_t find_reply(const struct session *s, uint64_t request, struct reply *out)
{
    uint64_t at = s->begin;
    for (; at < s->end; at += reply_bytes(out->length)) {
        ring_read(s, at, out, sizeof(*out));
        if (out->request == request)
            break;
    }
    return at;
}

void *kvd_ledger_recall(const struct kvd_ledger *l, uint32_t session, uint64_t request,
                        uint64_t *method, size_t *length)
{
    const struct session *s = &l->session[session];
    struct reply head;
    uint64_t at = find_reply(s, request, &head);
    uint8_t *data = at < s->end ? malloc(head.length + 1) : NULL;
    if (!data)
        return NULL;
    ring_read(s, at + sizeof(head), data, head.length);
    *method = head.method;
    *length = head.length;
    return data;
}

bool kvd_ledger_freeing(const struct kvd_ledger *l, uint32_t session, uint64_t request)
{
    for (size_t i = 0; i < KVD_LEDGER_FREEING && request; i++)
        if (l->session[session].freeing[i] == request)
            return true;
    return false;
}

// What holds say of a request. Ids may have the same one.
static uint32_t mark_of(uint64_t request)
{
    return (uint32_t)request ? (uint32_t)request : (uint32_t)(request >> 32);
}

bool kvd_ledger_freeing_fits(const struct kvd_ledger *l, uint32_t session, uint64_t request)
{
    const uint64_t *freeing = l->session[session].freeing;
    uint32_t free = 0;
    if (request == 0 || kvd_ledger_freeing(l, session, request))
        return true;
    for (size_t i = 0; i < KVD_LEDGER_FREEING; i++) {
        free += !freeing[i];
        if (freeing[i] && mark_of(freeing[i]) == mark_of(request))
            return false;
    }
    return free > 0;
}

bool kvd_ledger_freeing_begin(struct kvd_ledger *l, uint32_t session, uint64_t request)
{
    struct session *s = &l->session[session];
    if (request == 0 || kvd_ledger_freeing(l, session, request))
        return true;
    if (!kvd_ledger_freeing_fits(l, session, request))
        return false;
    for (size_t i = 0; i < KVD_LEN(s->freeing); i++) {
        if (s->freeing[i])
            continue;
        s->freeing[i] = request;
        stored();
        return true;
    }
    return false;
}

// -- sessions -----------------------------------------------------------------------------------

uint64_t kvd_ledger_next_id(struct kvd_ledger *l)
{
    return ++l->head->next_id;
}

uint32_t kvd_ledger_add(struct kvd_ledger *l, const struct kvd_ledger_session *is)
{
    if (l->n_free == 0 && l->head->n_sessions == l->head->max_sessions)
        return KVD_LEDGER_NONE;
    uint32_t i = l->n_free ? l->free_session[--l->n_free] : l->head->n_sessions;
    struct session *s = &l->session[i];
    s->used = 0; // of a record that was never used: whatever happens to be there
    stored();
    if (i == l->head->n_sessions)
        l->head->n_sessions++;
    s->is = *is;
    s->batches = s->making = s->begin = s->end = 0;
    memset(s->freeing, 0, sizeof(s->freeing));
    stored();
    s->used = 1;
    stored();
    return i;
}

static void free_hold(struct kvd_ledger *l, uint32_t hold)
{
    l->hold[hold].next = l->free_hold;
    l->free_hold = hold;
}

void kvd_ledger_drop(struct kvd_ledger *l, uint32_t session)
{
    struct session *s = &l->session[session];
    uint64_t from = kvd_round_up((uint64_t)(uintptr_t)s->replies, 4096);
    uint64_t to = (uint64_t)(uintptr_t)(s + 1) / 4096 * 4096;
    s->used = 0; // with this it is gone
    stored();
    if (s->end > 4096)
        madvise((void *)(uintptr_t)from, to - from, MADV_REMOVE);
    l->free_session[l->n_free++] = session;
}

void kvd_ledger_forget(struct kvd_ledger *l, uint32_t hold)
{
    l->hold[hold].n.all = 0;
    stored();
    free_hold(l, hold);
}

const struct kvd_ledger_session *kvd_ledger_session(const struct kvd_ledger *l, uint32_t session)
{
    return l->session[session].used ? &l->session[session].is : NULL;
}

uint32_t kvd_ledger_sessions(const struct kvd_ledger *l)
{
    return l->head->n_sessions;
}

void kvd_ledger_resumed(struct kvd_ledger *l, uint32_t session, uint64_t opened_by)
{
    struct kvd_ledger_session *s = &l->session[session].is;
    s->opened_by = opened_by;
    stored();
    s->generation++;
    stored();
}

// -- holds --------------------------------------------------------------------------------------

static uint32_t new_hold(struct kvd_ledger *l)
{
    uint32_t i = l->free_hold;
    if (i != KVD_LEDGER_NONE) {
        l->free_hold = l->hold[i].next;
        return i;
    }
    if (l->head->n_holds == l->head->max_holds)
        return KVD_LEDGER_NONE;
    l->hold[l->head->n_holds].n.all = 0;
    stored();
    return l->head->n_holds++;
}

uint32_t kvd_ledger_hold(struct kvd_ledger *l, uint32_t session, uint32_t hold, uint64_t seq)
{
    struct session *s = &l->session[session];
    bool new = hold == KVD_LEDGER_NONE;
    if (new)
        hold = new_hold(l);
    if (hold == KVD_LEDGER_NONE || l->hold[hold].n.is.holds == KVD_LEDGER_MOST_HOLDS)
        return KVD_LEDGER_NONE;
    if (!s->making) {
        s->batches++;
        stored();
        s->making = s->batches;
    }
    struct hold *h = &l->hold[hold];
    union count n = h->n;
    if (new) {
        h->seq = seq;
        h->session = session;
        h->owner = s->is.id;
        n.all = 0;
    }
    if (h->batch != s->making || new) { // a second time within one call: it was what it was
        n.is.before = n.is.holds;
        h->n.all = n.all;
        stored();
        h->batch = s->making;
        stored();
    }
    n.is.holds++;
    h->n.all = n.all;
    stored();
    return hold;
}

void kvd_ledger_release(struct kvd_ledger *l, uint32_t hold, uint32_t n, uint64_t request)
{
    struct hold *h = &l->hold[hold];
    union count c = h->n;
    c.is.holds = (uint16_t)(c.is.holds - n);
    c.is.before = KVD_MIN(c.is.before, c.is.holds);
    c.is.by = mark_of(request);
    h->n.all = c.all;
    stored();
    if (c.is.holds == 0)
        free_hold(l, hold);
}

bool kvd_ledger_released_by(const struct kvd_ledger *l, uint32_t hold, uint64_t request)
{
    return request && l->hold[hold].n.is.by == mark_of(request);
}

// The session of a record, or NULL: it has ended.
static const struct session *owner_of(const struct kvd_ledger *l, const struct hold *h)
{
    const struct session *s = h->session < l->head->n_sessions ? &l->session[h->session] : NULL;
    return s && s->used && s->is.id == h->owner ? s : NULL;
}

uint32_t kvd_ledger_held(const struct kvd_ledger *l, uint32_t hold, uint32_t *session,
                         uint64_t *seq)
{
    const struct hold *h = &l->hold[hold];
    *session = h->session;
    *seq = h->seq;
    return h->n.is.holds && owner_of(l, h) ? h->n.is.holds : 0;
}

uint32_t kvd_ledger_holds(const struct kvd_ledger *l)
{
    return l->head->n_holds;
}

// -- opening ------------------------------------------------------------------------------------

static bool ends(const char *text, size_t size)
{
    return memchr(text, 0, size) != NULL;
}

// Whether the replies follow each other from begin to end; and whether the last is of the call that
// was being made, which makes that true.
static bool replies_ok(struct session *s)
{
    struct reply head = {0};
    uint64_t at = s->begin;
    if (s->end < s->begin || s->end - s->begin > KVD_LEDGER_REPLIES)
        return false;
    while (at < s->end) {
        if (s->end - at < sizeof(head))
            return false;
        ring_read(s, at, &head, sizeof(head));
        if (head.length > KVD_LEDGER_REPLIES || reply_bytes(head.length) > s->end - at)
            return false;
        at += reply_bytes(head.length);
    }
    if (s->making && head.batch == s->making)
        s->making = 0;
    return true;
}

static int check_session(struct kvd_ledger *l, uint32_t i, struct kvd_error *err)
{
    struct session *s = &l->session[i];
    const struct kvd_ledger_session *is = &s->is;
    if (s->used == 0)
        return KVD_OK;
    if (s->used != 1 || is->id == 0 || is->id > l->head->next_id || is->generation == 0 ||
        !ends(is->secret, sizeof(is->secret)) || strlen(is->secret) != KVD_SECRET_TEXT - 1 ||
        !ends(is->ns, sizeof(is->ns)) || !kvd_name_valid(is->ns, KVD_MAX_NAMESPACE) ||
        !ends(is->client_name, sizeof(is->client_name)) || !replies_ok(s))
        return kvd_fail(err, KVD_E_CORRUPT, "record %u of the ledger of sessions makes no sense",
                        i);
    return KVD_OK;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int check_ids(const struct kvd_ledger *l, struct kvd_error *err)
{
    uint64_t *ids KVD_FREE = calloc((size_t)l->head->n_sessions + 1, sizeof(*ids));
    size_t n = 0;
    if (!ids)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < l->head->n_sessions; i++)
        if (l->session[i].used)
            ids[n++] = l->session[i].is.id;
    qsort(ids, n, sizeof(*ids), compare);
    for (size_t i = 1; i < n; i++)
        if (ids[i] == ids[i - 1])
            return kvd_fail(err, KVD_E_CORRUPT, "two sessions have the id %llu",
                            (unsigned long long)ids[i]);
    return KVD_OK;
}

// Holds of what is no session go, and those that a call had made which was not done.
static void settle_hold(struct kvd_ledger *l, uint32_t i)
{
    struct hold *h = &l->hold[i];
    const struct session *s = owner_of(l, h);
    union count n = h->n;
    if (!s)
        n.all = 0;
    else if (s->making && h->batch == s->making)
        n.is.holds = KVD_MIN(n.is.holds, n.is.before);
    h->n.all = n.all;
    if (n.is.holds == 0)
        free_hold(l, i);
}

static int recover(struct kvd_ledger *l, struct kvd_error *err)
{
    struct head *h = l->head;
    if (h->n_sessions > h->max_sessions || h->n_holds > h->max_holds)
        return kvd_fail(err, KVD_E_CORRUPT,
                        "the head of the ledger of sessions contradicts itself");
    for (uint32_t i = 0; i < h->n_sessions; i++)
        if (check_session(l, i, err))
            return err->code;
    if (check_ids(l, err))
        return err->code;
    for (uint32_t i = h->n_sessions; i-- > 0;)
        if (!l->session[i].used)
            l->free_session[l->n_free++] = i;
    for (uint32_t i = h->n_holds; i-- > 0;)
        settle_hold(l, i);
    stored();
    for (uint32_t i = 0; i < h->n_sessions; i++)
        l->session[i].making = 0;
    h->restarts++;
    stored();
    return KVD_OK;
}

struct kvd_ledger *kvd_ledger_open(int fd, uint32_t max_sessions, uint32_t max_holds,
                                   struct kvd_error *err)
{
    struct head h;
    if (pread(fd, &h, sizeof(h), 0) != (ssize_t)sizeof(h) || h.magic != MAGIC) {
        kvd_fail(err, KVD_E_INVALID, "this is no ledger of sessions");
        return NULL;
    }
    if (h.version != VERSION || h.shape != shape()) {
        kvd_fail(err, KVD_E_UNSUPPORTED,
                 "the ledger of sessions has version %u (%08x), and this kvd reads version %u "
                 "(%08x)",
                 h.version, h.shape, VERSION, shape());
        return NULL;
    }
    if (h.max_sessions != max_sessions || h.max_holds != max_holds) {
        kvd_fail(err, KVD_E_PRECONDITION,
                 "the ledger of sessions has room for %u sessions and %u sequences, and the "
                 "configuration wants %u and %u",
                 h.max_sessions, h.max_holds, max_sessions, max_holds);
        return NULL;
    }
    int copy KVD_CLOSE = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0) {
        kvd_fail(err, KVD_E_INTERNAL, "cannot open the ledger of sessions: %s", strerror(errno));
        return NULL;
    }
    struct kvd_ledger *l = map(copy, max_sessions, max_holds, err);
    if (!l)
        return NULL;
    (void)KVD_TAKE_FD(copy);
    if (recover(l, err))
        kvd_ledger_close(&l);
    return l;
}

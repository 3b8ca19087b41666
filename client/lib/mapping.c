// Direct mode's pages: MapSequences, and the descriptors that come over the fd socket.
#include <errno.h>
#include <math.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "client/lib/direct.h"
#include "kernels/tc.h"
#include "proto/fdsock.h"

// Receives one message. 1: there was one; 0: none waits; negative: the socket is closed.
static int receive(int sock, struct kvd_fd_grant *grant, int *fd)
{
    union {
        struct cmsghdr head;
        uint8_t space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov = {grant, sizeof(*grant)};
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof(control)};
    ssize_t n = recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    *fd = -1;
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    struct cmsghdr *h = CMSG_FIRSTHDR(&msg);
    if (h && h->cmsg_level == SOL_SOCKET && h->cmsg_type == SCM_RIGHTS)
        memcpy(fd, CMSG_DATA(h), sizeof(*fd));
    return n == sizeof(*grant) && grant->magic == KVD_FD_MAGIC ? 1 : -1;
}

// Takes what a message brings. The fd is closed here or kept.
static int take(struct kvd_direct *d, const struct kvd_fd_grant *grant, int fd_taken,
                struct kvd_error *err)
{
    int fd KVD_CLOSE = fd_taken;
    if (fd < 0 && grant->kind != KVD_FD_REVOKE)
        return kvd_fail(err, KVD_E_LIMIT,
                        "this process has no file descriptor free for what kvd lends it: raise the "
                        "limit of open files (ulimit -n), and open direct mode again");
    const struct kvd_backend_ops *ops = d->backend ? d->backend->ops : NULL;
    if (grant->kind == KVD_FD_ROTATIONS) {
        if (grant->extent >= d->n_planes)
            return kvd_fail(err, KVD_E_INTERNAL, "kvd speaks of rotations of plane %u of %u",
                            grant->extent, d->n_planes);
        struct direct_plane *plane = &d->planes[grant->extent];
        if (plane->rotation_fd >= 0)
            close(plane->rotation_fd);
        plane->rotation_fd = KVD_TAKE_FD(fd);
        return KVD_OK;
    }
    if (!d->arena || grant->extent >= d->arena->count)
        return kvd_fail(err, KVD_E_INTERNAL, "kvd speaks of extent %u, which is none of its own",
                        grant->extent);
    if (grant->kind == KVD_FD_REVOKE) {
        ops->extent_drop(d->backend, d->arena, grant->extent);
        d->mapped[grant->extent] = false;
        return KVD_OK;
    }
    if (grant->bytes != d->arena->bytes)
        return kvd_fail(err, KVD_E_INTERNAL, "extent %u has %llu bytes instead of %llu",
                        grant->extent, (unsigned long long)grant->bytes,
                        (unsigned long long)d->arena->bytes);
    // On a GPU the memory is the same after kvd began anew, and kernels may be reading it.
    if (d->mapped[grant->extent] && d->memory[grant->extent] == grant->memory)
        return KVD_OK;
    int rc = ops->extent_import(d->backend, d->arena, grant->extent, fd, err);
    d->mapped[grant->extent] = rc == KVD_OK;
    d->memory[grant->extent] = grant->memory;
    return rc;
}

static int read_socket(struct kvd_direct *d, struct kvd_error *err)
{
    struct kvd_fd_grant grant;
    int fd, result = KVD_OK;
    int rc = kvd_client_enter(d->client, kvd_client_deadline(d->client), err);
    if (rc)
        return rc;
    bool same = d->client->sessions == d->sessions;
    // A session that may be resumed gets a new connection with the next call.
    bool resumes = same && kvd_client_resumes(d->client);
    bool there = same && !d->client->lost;
    while (there && (rc = receive(d->client->sock, &grant, &fd)) > 0) {
        int took = take(d, &grant, fd, err);
        result = result ? result : took;
    }
    kvd_gate_leave(&d->client->gate);
    if (!resumes && (!there || rc < 0))
        return kvd_fail(err, KVD_E_LOST,
                        "the session that direct mode was opened with is gone; close the "
                        "kvd_direct, and open one on the new session");
    return result;
}

int kvd_direct_read_socket(struct kvd_direct *d, struct kvd_error *err)
{
    pthread_mutex_lock(&d->socket_lock);
    int rc = read_socket(d, err);
    pthread_mutex_unlock(&d->socket_lock);
    return rc;
}

// The address of a page number, 0 for none.
static int address_of(const struct kvd_direct *d, uint32_t number, uint64_t *out,
                      struct kvd_error *err)
{
    uint64_t at = (uint64_t)number * KVD_PAGE_UNIT, extent = at / d->arena->bytes;
    *out = 0;
    if (number == UINT32_MAX)
        return KVD_OK;
    if (extent >= d->arena->count || !d->mapped[extent])
        return kvd_fail(err, KVD_E_INTERNAL, "page %u lies in extent %llu, which was not lent",
                        number, (unsigned long long)extent);
    *out = d->arena->base + at;
    return KVD_OK;
}

// Whether a plane's part of the answer is possible. `before`: what the slot's table holds of it.
static bool plane_fits(const struct direct_plane *plane, uint32_t before, uint64_t length,
                       const Kvd__V1__SequencePages *p)
{
    // The next step's first query, at `length`, must find all tokens that its window has.
    uint64_t seen =
        plane->shape.window && length >= plane->shape.window ? length + 1 - plane->shape.window : 0;
    return p->codec_from <= before && p->n_bf16_pages <= plane->bf16_stride &&
           p->hist_end <= length + plane->shape.sink && p->first <= seen;
}

static int take_plane(struct kvd_direct *d, uint32_t slot, uint32_t index,
                      const Kvd__V1__SequencePages *p, struct kvd_error *err)
{
    struct direct_slot *s = &d->slots[slot];
    const struct direct_plane *plane = &d->planes[index];
    uint64_t *codec = plane->next_codec + (uint64_t)slot * plane->codec_stride;
    uint64_t *bf16 = plane->next_bf16 + (uint64_t)slot * plane->bf16_stride;
    uint64_t n_codec = p->codec_from + p->n_codec_pages;
    int rc = KVD_OK;
    for (size_t i = 0; i < p->n_bf16_pages && rc == KVD_OK; i++)
        rc = address_of(d, p->bf16_pages[i], &bf16[i], err);
    for (size_t i = 0; i < p->n_codec_pages && rc == KVD_OK; i++)
        rc = address_of(d, p->codec_pages[i], &codec[p->codec_from + i], err);
    if (rc)
        return rc;
    // What a window has freed since is another's by now. Its planes have no sink.
    uint64_t freed = KVD_MIN(p->first / KVD_PAGE_TOKENS, n_codec);
    memset(codec, 0, freed * sizeof(*codec));
    s->next.planes[index].hist_end = p->hist_end;
    s->next.planes[index].n_codec = (uint32_t)n_codec;
    return KVD_OK;
}

static int take_pages(struct kvd_direct *d, uint32_t slot, const Kvd__V1__SequencePages *first,
                      struct kvd_error *err)
{
    struct direct_slot *s = &d->slots[slot];
    if (first->n_others != d->n_planes - 1)
        return kvd_fail(err, KVD_E_INTERNAL, "kvd told page tables of %zu planes, there are %u",
                        first->n_others + 1, d->n_planes);
    for (uint32_t i = 0; i < d->n_planes; i++) {
        const Kvd__V1__SequencePages *p = i ? first->others[i - 1] : first;
        if (first->length > d->options.max_tokens ||
            p->codec_from + p->n_codec_pages > d->planes[i].codec_stride)
            return kvd_fail(err, KVD_E_LIMIT, "sequence %llu has %llu tokens, max_tokens is %u",
                            (unsigned long long)s->sequence, (unsigned long long)first->length,
                            d->options.max_tokens);
        if (!plane_fits(&d->planes[i], s->next.planes[i].n_codec, first->length, p))
            return kvd_fail(err, KVD_E_INTERNAL,
                            "kvd's page table of sequence %llu does not fit, plane %u",
                            (unsigned long long)s->sequence, i);
    }
    int rc = KVD_OK;
    for (uint32_t i = 0; i < d->n_planes && rc == KVD_OK; i++)
        rc = take_plane(d, slot, i, i ? first->others[i - 1] : first, err);
    if (rc)
        return rc;
    s->next.stored = first->length;
    s->fresh = true;
    return KVD_OK;
}

// The pool's layout, on the first call.
static int make_arena(struct kvd_direct *d, const Kvd__V1__MapSequencesReply *reply,
                      struct kvd_error *err)
{
    if (d->arena)
        return KVD_OK;
    if (reply->extents == 0 || reply->extent_bytes == 0 || reply->extent_bytes % (2 << 20) ||
        reply->extent_bytes > (1ull << 47) / reply->extents)
        return kvd_fail(err, KVD_E_INTERNAL,
                        "kvd's pool of %u extents of %llu bytes makes no sense", reply->extents,
                        (unsigned long long)reply->extent_bytes);
    d->arena = d->backend->ops->arena_new(d->backend, reply->extents, reply->extent_bytes, err);
    if (!d->arena)
        return err->code;
    d->mapped = calloc(reply->extents, sizeof(*d->mapped));
    d->memory = calloc(reply->extents, sizeof(*d->memory));
    return d->mapped && d->memory ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
}

// One call; *more when the fd socket was full.
static int map_once(struct kvd_direct *d, Kvd__V1__MapSequencesRequest *req, const uint32_t *list,
                    bool *more, uint64_t deadline, struct kvd_error *err)
{
    Kvd__V1__MapSequencesReply *reply;
    kvd_failure failure;
    if (kvd_client_call_until(d->client, "/kvd.v1.KvCache/MapSequences", req, &req->session,
                              &kvd__v1__map_sequences_reply__descriptor, &reply, deadline,
                              &failure))
        return kvd_client_failed(&failure, err);
    int rc = make_arena(d, reply, err);
    if (rc == KVD_OK)
        rc = read_socket(d, err);
    *more = reply->more;
    if (rc == KVD_OK && !reply->more && reply->n_sequences != req->n_items)
        rc = kvd_fail(err, KVD_E_INTERNAL, "asked for %zu sequences, got %zu", req->n_items,
                      reply->n_sequences);
    pthread_mutex_lock(&d->lock);
    for (size_t i = 0; i < reply->n_sequences && rc == KVD_OK && !reply->more; i++)
        rc = take_pages(d, list[i], reply->sequences[i], err);
    pthread_mutex_unlock(&d->lock);
    kvd__v1__map_sequences_reply__free_unpacked(reply, NULL);
    return rc;
}

int kvd_direct_map(struct kvd_direct *d, const uint32_t *list, uint32_t n, uint64_t deadline,
                   struct kvd_error *err)
{
    Kvd__V1__MapSequencesRequest req = KVD__V1__MAP_SEQUENCES_REQUEST__INIT;
    Kvd__V1__MapItem *items KVD_FREE = calloc(n + 1, sizeof(*items));
    Kvd__V1__MapItem **refs KVD_FREE = calloc(n + 1, sizeof(*refs));
    uint32_t *known KVD_FREE = calloc((size_t)n * KVD_MAX_PLANES + 1, sizeof(*known));
    if (!items || !refs || !known)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    for (uint32_t i = 0; i < n; i++) {
        const struct direct_slot *s = &d->slots[list[i]];
        uint32_t *others = known + (size_t)i * KVD_MAX_PLANES;
        kvd__v1__map_item__init(&items[i]);
        items[i].sequence = s->sequence;
        // The last page may have been copied before it was written.
        for (uint32_t p = 0; p < d->n_planes; p++) {
            uint32_t pages = s->next.planes[p].n_codec;
            *(p ? &others[p - 1] : &items[i].codec_from) = pages ? pages - 1 : 0;
        }
        items[i].n_other_codec_from = d->n_planes - 1;
        items[i].other_codec_from = others;
        refs[i] = &items[i];
    }
    req.n_items = n;
    req.items = refs;
    req.again = !d->arena; // another kvd_direct of this session may have had them
    bool more = true;
    int rc = KVD_OK;
    pthread_mutex_lock(&d->socket_lock);
    while (more && rc == KVD_OK)
        rc = map_once(d, &req, list, &more, deadline, err);
    pthread_mutex_unlock(&d->socket_lock);
    return rc;
}

// Whether the bits of K's codes in tc2 and tc2.5 are ones that pages of `codec` have room for.
static bool bits_fit(const struct kvd_rotation_data *d, uint32_t codec)
{
    uint32_t tiles = d->dim_k / KVD_TC_TILE;
    for (uint64_t i = 0; i < (uint64_t)d->n_layers * d->heads && d->k_bits; i++) {
        float sum = 0;
        for (uint32_t t = 0; t < tiles; t++) {
            float b = d->k_bits[i * tiles + t];
            if (!(b >= 0 && b <= KVD_TC_MAX_BITS && b == floorf(b)))
                return false;
            sum += b;
        }
        if (!kvd_codec_tc(codec) || sum != (float)kvd_tc_stream_bits(codec, d->dim_k))
            return false;
    }
    return true;
}

// Points the set at the arrays behind its head. False: these are not what the memfd has.
static bool take_terms(const struct kvd_fd_rotations *head, uint64_t bytes, uint32_t codec,
                       struct kvd_rotation_data *out)
{
    struct kvd_term terms[KVD_TERMS];
    uint64_t n = (uint64_t)head->n_layers * head->heads, at = 0;
    out->n_layers = head->n_layers;
    out->heads = head->heads;
    kvd_rotation_terms(out, terms);
    for (uint32_t i = 0; i < KVD_TERMS_TO_ATTEND; i++) {
        if (!(head->terms >> i & 1))
            continue;
        *terms[i].at = (const float *)(head + 1) + at;
        at += n * terms[i].each;
    }
    return head->terms >> KVD_TERMS_TO_ATTEND == 0 && bytes == sizeof(*head) + at * sizeof(float) &&
           bits_fit(out, codec);
}

static int load_rotation(struct kvd_direct *d, struct direct_plane *plane, struct kvd_error *err)
{
    const struct kvd_plane *g = &plane->shape;
    struct kvd_rotation_data data = {
        .n_layers = 1, .heads = 1, .dim_k = g->head_dim_k, .dim_v = g->head_dim_v};
    const struct kvd_fd_rotations *head = MAP_FAILED;
    struct stat st = {0};
    if (kvd_codecs_rotated(g->codec)) {
        if (plane->rotation_fd < 0 || fstat(plane->rotation_fd, &st) ||
            (size_t)st.st_size < sizeof(*head))
            return kvd_fail(err, KVD_E_INTERNAL, "kvd sent no rotation set");
        head = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, plane->rotation_fd, 0);
        if (head == MAP_FAILED)
            return kvd_fail(err, KVD_E_INTERNAL, "cannot map the rotation set: %s",
                            strerror(errno));
        if (head->magic != KVD_FD_MAGIC || head->version != KVD_FD_VERSION ||
            head->n_layers > KVD_MAX_LAYERS || head->heads > KVD_MAX_KV_HEADS ||
            head->dim_k != g->head_dim_k || head->dim_v != g->head_dim_v ||
            !take_terms(head, (uint64_t)st.st_size, g->codec.k, &data)) {
            munmap((void *)head, (size_t)st.st_size);
            return kvd_fail(err, KVD_E_INTERNAL, "kvd's rotation set does not fit the layout");
        }
    }
    plane->rotation = d->backend->ops->rotation_new(d->backend, &data, err);
    if (head != MAP_FAILED)
        munmap((void *)head, (size_t)st.st_size);
    return plane->rotation ? KVD_OK : err->code;
}

int kvd_direct_load_rotations(struct kvd_direct *d, struct kvd_error *err)
{
    int rc = KVD_OK;
    for (uint32_t p = 0; p < d->n_planes && rc == KVD_OK; p++)
        rc = load_rotation(d, &d->planes[p], err);
    return rc;
}

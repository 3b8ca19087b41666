#include "daemon/rpc/relay.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509.h>
#include <string.h>
#include <sys/socket.h>

#include "daemon/rpc/meter.h"

enum { ROUNDS = 4 }; // of records both ways, then others have their turn

// -- a relay's end ------------------------------------------------------------------------------

static void on_closed(uv_handle_t *handle)
{
    struct kvd_relay *r = handle->data;
    if (--r->handles == 0)
        r->over(r);
}

// Both sides hear of it; what was written on either still goes out.
void kvd_relay_end(struct kvd_relay *r)
{
    if (r->ended)
        return;
    r->ended = true;
    if (r->pair >= 0)
        shutdown(r->pair, SHUT_RDWR);
    shutdown(r->fd, SHUT_WR);
    SSL_free(r->ssl);
    r->ssl = NULL;
    free(r->in);
    free(r->out);
    r->in = r->out = NULL;
    uv_close((uv_handle_t *)&r->wire_poll, on_closed);
    if (r->handles > 1)
        uv_close((uv_handle_t *)&r->pair_poll, on_closed);
}

// -- bytes --------------------------------------------------------------------------------------

// What a call of the TLS library that did not succeed waits for; 0: for nothing any more.
static int wants(const struct kvd_relay *r, int rc)
{
    switch (SSL_get_error(r->ssl, rc)) {
    case SSL_ERROR_WANT_READ:
        return UV_READABLE;
    case SSL_ERROR_WANT_WRITE:
        return UV_WRITABLE;
    default:
        return 0;
    }
}

static bool would_block(ssize_t n)
{
    return n < 0 && (errno == EAGAIN || errno == EINTR);
}

// From the client to gRPC. True: some bytes went on. The relay has ended when the client is gone.
static bool move_in(struct kvd_relay *r)
{
    struct kvd_flow *f = r->in;
    f->wants = 0;
    if (f->at == f->end) {
        ERR_clear_error();
        int n = SSL_read(r->ssl, f->bytes, sizeof(f->bytes));
        f->wants = n > 0 ? 0 : wants(r, n);
        if (n <= 0 && !f->wants)
            kvd_relay_end(r);
        if (n <= 0)
            return false;
        f->at = 0;
        f->end = (size_t)n;
    }
    ssize_t n = send(r->pair, f->bytes + f->at, f->end - f->at, MSG_NOSIGNAL);
    if (n > 0)
        f->at += (size_t)n;
    else if (!would_block(n))
        kvd_relay_end(r);
    return n > 0;
}

// From gRPC to the client. The relay has ended when gRPC has closed the connection.
static bool move_out(struct kvd_relay *r)
{
    struct kvd_flow *f = r->out;
    f->wants = 0;
    if (f->at == f->end) {
        ssize_t n = recv(r->pair, f->bytes, sizeof(f->bytes), 0);
        if (n <= 0 && !would_block(n)) {
            SSL_shutdown(r->ssl);
            kvd_relay_end(r);
        }
        if (n <= 0)
            return false;
        f->at = 0;
        f->end = (size_t)n;
    }
    ERR_clear_error();
    int n = SSL_write(r->ssl, f->bytes + f->at, (int)(f->end - f->at));
    f->wants = n > 0 ? UV_WRITABLE : wants(r, n);
    if (n > 0)
        f->at += (size_t)n;
    else if (!f->wants)
        kvd_relay_end(r);
    return n > 0;
}

static void on_event(uv_poll_t *poll, int status, int events);

static void watch(uv_poll_t *poll, int *before, int events)
{
    if (events == *before)
        return;
    *before = events;
    if (events)
        uv_poll_start(poll, events, on_event);
    else
        uv_poll_stop(poll);
}

static void pump(struct kvd_relay *r)
{
    bool moved = true;
    for (int i = 0; i < ROUNDS && moved && !r->ended; i++) {
        moved = move_in(r);
        if (!r->ended)
            moved |= move_out(r);
    }
    if (r->ended)
        return;
    bool in_waits = r->in->at < r->in->end, out_waits = r->out->at < r->out->end;
    int reads = r->in->wants ? r->in->wants : UV_READABLE;
    watch(&r->wire_poll, &r->wire_events, (in_waits ? 0 : reads) | (out_waits ? r->out->wants : 0));
    watch(&r->pair_poll, &r->pair_events,
          (in_waits ? UV_WRITABLE : 0) | (out_waits ? 0 : UV_READABLE));
}

// -- the handshake ------------------------------------------------------------------------------

// The one common name of the client's certificate, which has been verified; with several, or with
// what is no text, it has none.
static void note_name(struct kvd_relay *r)
{
    X509 *x = SSL_get1_peer_certificate(r->ssl);
    X509_NAME *subject = x ? X509_get_subject_name(x) : NULL;
    int i = subject ? X509_NAME_get_index_by_NID(subject, NID_commonName, -1) : -1;
    unsigned char *text = NULL;
    int n = -1;
    if (i >= 0 && X509_NAME_get_index_by_NID(subject, NID_commonName, i) < 0)
        n = ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, i)));
    if (n > 0 && (size_t)n < sizeof(r->name) && !memchr(text, '\0', (size_t)n))
        memcpy(r->name, text, (size_t)n);
    OPENSSL_free(text);
    X509_free(x);
}

static void fail(struct kvd_relay *r, const char *why)
{
    r->why = why;
    kvd_relay_end(r);
}

// The client is who it says: gRPC gets its end.
static void open_pair(struct kvd_relay *r)
{
    int pair[2];
    const unsigned char *protocol = NULL;
    unsigned int len = 0;
    SSL_get0_alpn_selected(r->ssl, &protocol, &len);
    if (!len) {
        fail(r, "the client speaks no HTTP/2");
        return;
    }
    r->in = calloc(1, sizeof(*r->in));
    r->out = calloc(1, sizeof(*r->out));
    if (!r->in || !r->out ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair)) {
        fail(r, r->in && r->out ? strerror(errno) : "out of memory");
        return;
    }
    kvd_meter_forget(pair[0]);
    kvd_meter_forget(pair[1]);
    r->pair = pair[0];
    if (uv_poll_init(r->wire_poll.loop, &r->pair_poll, r->pair)) {
        close(pair[1]);
        fail(r, "out of memory");
        return;
    }
    r->pair_poll.data = r;
    r->handles++;
    r->clear = pair[1];
    note_name(r);
    r->ready(r);
    pump(r);
}

static const char *reason(void)
{
    const char *text = ERR_reason_error_string(ERR_peek_last_error());
    return text ? text : "the client hung up";
}

static void shake(struct kvd_relay *r)
{
    ERR_clear_error();
    int rc = SSL_accept(r->ssl);
    if (rc == 1) {
        open_pair(r);
        return;
    }
    int events = wants(r, rc);
    if (!events)
        fail(r, reason());
    else
        watch(&r->wire_poll, &r->wire_events, events);
}

static void on_event(uv_poll_t *poll, int status, int events)
{
    struct kvd_relay *r = poll->data;
    (void)events;
    if (r->ended)
        return;
    if (status < 0)
        kvd_relay_end(r); // the socket is broken
    else if (r->pair < 0)
        shake(r);
    else
        pump(r);
}

void kvd_relay_start(struct kvd_relay *r, uv_loop_t *loop, SSL_CTX *context)
{
    r->pair = -1;
    r->ssl = SSL_new(context);
    if (!r->ssl || SSL_set_fd(r->ssl, r->fd) != 1 || uv_poll_init(loop, &r->wire_poll, r->fd)) {
        SSL_free(r->ssl);
        r->why = "out of memory";
        r->over(r);
        return;
    }
    r->wire_poll.data = r;
    r->handles = 1;
    SSL_set_accept_state(r->ssl);
    shake(r);
}

#include "daemon/core/tls_context.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// gRPC's clients want to hear that it is HTTP/2.
static int choose_protocol(SSL *ssl, const unsigned char **out, unsigned char *out_len,
                           const unsigned char *offered, unsigned int n, void *arg)
{
    static const unsigned char h2[] = {2, 'h', '2'};
    (void)ssl;
    (void)arg;
    return SSL_select_next_proto((unsigned char **)out, out_len, h2, sizeof(h2), offered, n) ==
                   OPENSSL_NPN_NEGOTIATED
               ? SSL_TLSEXT_ERR_OK
               : SSL_TLSEXT_ERR_ALERT_FATAL;
}

// Whether it can be read, so that the library's errors are about what is in it. Nothing that could
// have the reader wait, as a pipe.
static bool readable(const char *path, struct kvd_error *err)
{
    struct stat st;
    if (stat(path, &st) || (S_ISREG(st.st_mode) && access(path, R_OK)))
        kvd_fail(err, KVD_E_INVALID, "%s: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        kvd_fail(err, KVD_E_INVALID, "%s is %s; it wants a file", path,
                 S_ISDIR(st.st_mode) ? "a folder" : "no file of bytes");
    ERR_clear_error();
    return err->code == KVD_OK;
}

// The library's error about a file: that there is no `what` in it, or why it will not do.
static void refuse(const char *path, const char *what, struct kvd_error *err)
{
    unsigned long e = ERR_peek_error(); // the first: those after it say who met it
    const char *text = ERR_reason_error_string(e);
    if (!text || ERR_GET_LIB(e) == ERR_LIB_PEM || ERR_GET_LIB(e) == ERR_LIB_ASN1)
        kvd_fail(err, KVD_E_INVALID, "%s has no %s", path, what);
    else
        kvd_fail(err, KVD_E_INVALID, "%s is not usable: %s", path, text);
}

static void show(SSL_CTX *ctx, const struct kvd_config *c, struct kvd_tls_problems *p)
{
    static char no_password[] = "";
    // Without a password at hand the library would ask for an encrypted key's on the terminal.
    SSL_CTX_set_default_passwd_cb_userdata(ctx, no_password);
    if (*c->tls_cert && readable(c->tls_cert, &p->cert) &&
        SSL_CTX_use_certificate_chain_file(ctx, c->tls_cert) != 1)
        refuse(c->tls_cert, "certificate in PEM", &p->cert);
    if (!*c->tls_key || !readable(c->tls_key, &p->key) ||
        SSL_CTX_use_PrivateKey_file(ctx, c->tls_key, SSL_FILETYPE_PEM) == 1)
        return;
    unsigned long e = ERR_peek_last_error();
    if (ERR_GET_LIB(e) == ERR_LIB_X509 && (ERR_GET_REASON(e) == X509_R_KEY_VALUES_MISMATCH ||
                                           ERR_GET_REASON(e) == X509_R_KEY_TYPE_MISMATCH))
        kvd_fail(&p->key, KVD_E_INVALID, "%s is not the key of %s", c->tls_key, c->tls_cert);
    else
        kvd_fail(&p->key, KVD_E_INVALID, "%s has no private key in PEM without a password",
                 c->tls_key);
}

// Client certificates are asked for, and must be good, where there is an authority for them.
static void trust(SSL_CTX *ctx, const char *authority, struct kvd_error *err)
{
    if (!*authority || !readable(authority, err))
        return;
    STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(authority);
    SSL_CTX_set_client_CA_list(ctx, names);
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    if (!names || SSL_CTX_load_verify_locations(ctx, authority, NULL) != 1)
        refuse(authority, "certificate in PEM", err);
}

SSL_CTX *kvd_tls_context(const struct kvd_config *c, struct kvd_tls_problems *problems)
{
    *problems = (struct kvd_tls_problems){0};
    SSL_CTX *ctx = SSL_CTX_new(TLS_server_method());
    if (!ctx) {
        kvd_fail(&problems->cert, KVD_E_INTERNAL, "out of memory");
        return NULL;
    }
    SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION);
    // No sessions are taken up again: each connection shows its certificate.
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(ctx, 0);
    SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                                 SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                              SSL_MODE_RELEASE_BUFFERS);
    // One record at a time: who sends records without data takes turns with others.
    SSL_CTX_clear_mode(ctx, SSL_MODE_AUTO_RETRY);
    SSL_CTX_set_alpn_select_cb(ctx, choose_protocol, NULL);
    show(ctx, c, problems);
    trust(ctx, c->tls_client_ca, &problems->client_ca);
    if (!problems->cert.code && !problems->key.code && !problems->client_ca.code)
        return ctx;
    SSL_CTX_free(ctx);
    return NULL;
}

// The certificates of a context, in their order, with how many there are of each sort.
static STACK_OF(X509) * certificates(const SSL_CTX *ctx, int *shown)
{
    STACK_OF(X509) *all = sk_X509_new_null(), *chain = NULL;
    STACK_OF(X509_OBJECT) *trusted = X509_STORE_get0_objects(SSL_CTX_get_cert_store(ctx));
    sk_X509_push(all, SSL_CTX_get0_certificate(ctx));
    SSL_CTX_get0_chain_certs((SSL_CTX *)ctx, &chain);
    for (int i = 0; i < sk_X509_num(chain); i++)
        sk_X509_push(all, sk_X509_value(chain, i));
    *shown = sk_X509_num(all);
    for (int i = 0; i < sk_X509_OBJECT_num(trusted); i++)
        sk_X509_push(all, X509_OBJECT_get0_X509(sk_X509_OBJECT_value(trusted, i)));
    return all;
}

bool kvd_tls_context_same(const SSL_CTX *a, const SSL_CTX *b)
{
    int shown_a, shown_b;
    STACK_OF(X509) *all_a = certificates(a, &shown_a), *all_b = certificates(b, &shown_b);
    bool same = shown_a == shown_b && sk_X509_num(all_a) == sk_X509_num(all_b);
    for (int i = 0; same && i < sk_X509_num(all_a); i++)
        same = X509_cmp(sk_X509_value(all_a, i), sk_X509_value(all_b, i)) == 0;
    sk_X509_free(all_a);
    sk_X509_free(all_b);
    return same;
}

double kvd_tls_context_until(const SSL_CTX *ctx)
{
    struct tm tm;
    const X509 *cert = SSL_CTX_get0_certificate(ctx);
    return cert && ASN1_TIME_to_tm(X509_get0_notAfter(cert), &tm) == 1 ? (double)timegm(&tm) : 0;
}

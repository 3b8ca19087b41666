// What connections over TLS show, and whom they trust: the files of [tls]. Checking a
// configuration, start and reload read them by this.
#ifndef KVD_DAEMON_TLS_CONTEXT_H
#define KVD_DAEMON_TLS_CONTEXT_H

#include <openssl/ssl.h>

#include "daemon/core/config.h"

// What is wrong with each file; code KVD_OK: nothing.
struct kvd_tls_problems {
    struct kvd_error cert, key, client_ca;
};

// Reads those files that are named, all of them, so that every problem is found. The caller's, to
// be given to SSL_CTX_free; NULL with at least one problem.
SSL_CTX *kvd_tls_context(const struct kvd_config *c, struct kvd_tls_problems *problems);
// Whether two of them show the same certificates and trust the same authorities.
bool kvd_tls_context_same(const SSL_CTX *a, const SSL_CTX *b);
// When the certificate that it shows ends, in Unix time.
double kvd_tls_context_until(const SSL_CTX *ctx);

#endif

// Signatures of rotation sets: Ed25519 over the text "kvd-rotation-set/1 <digest>\n", 64 raw bytes,
// keys in PEM. OpenSSL's own tool makes and checks the same:
//   printf 'kvd-rotation-set/1 sha256:...\n' | openssl pkeyutl -sign -rawin -inkey key.pem
#ifndef KVD_CALIB_SIGN_H
#define KVD_CALIB_SIGN_H

#include "proto/base.h"

enum { KVD_SIGNATURE_BYTES = 64 };

// KVD_E_NOT_FOUND (no such file), KVD_E_INVALID (no Ed25519 private key).
int kvd_sign(const char *key, const char *digest, uint8_t out[KVD_SIGNATURE_BYTES],
             struct kvd_error *err);
// KVD_E_DENIED when the signature is not that key's. The key's errors as above.
int kvd_sign_verify(const char *public_key, const char *digest, const uint8_t *signature, size_t n,
                    struct kvd_error *err);
// Whether a file is an Ed25519 public key.
int kvd_sign_check_key(const char *public_key, struct kvd_error *err);

#endif

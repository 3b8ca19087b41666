#include "calib/sign.h"

#include <errno.h>
#include <openssl/evp.h>
#include <openssl/pem.h>

static EVP_PKEY *load_key(const char *path, bool secret, struct kvd_error *err)
{
    FILE *f = fopen(path, "re");
    if (!f) {
        kvd_fail(err, errno == ENOENT ? KVD_E_NOT_FOUND : -errno, "%s: %s", path, strerror(errno));
        return NULL;
    }
    // An empty passphrase: nobody is asked for one.
    EVP_PKEY *key =
        secret ? PEM_read_PrivateKey(f, NULL, NULL, "") : PEM_read_PUBKEY(f, NULL, NULL, "");
    fclose(f);
    if (key && EVP_PKEY_get_base_id(key) == EVP_PKEY_ED25519)
        return key;
    EVP_PKEY_free(key);
    kvd_fail(err, KVD_E_INVALID,
             "%s: not an Ed25519 %s key in PEM (openssl genpkey -algorithm ed25519%s)", path,
             secret ? "private" : "public", secret ? "" : "; openssl pkey -pubout");
    return NULL;
}

static size_t message(const char *digest, char *out, size_t cap)
{
    return (size_t)snprintf(out, cap, "kvd-rotation-set/1 %s\n", digest);
}

int kvd_sign(const char *key, const char *digest, uint8_t out[KVD_SIGNATURE_BYTES],
             struct kvd_error *err)
{
    EVP_PKEY *k = load_key(key, true, err);
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    char text[128];
    size_t n = message(digest, text, sizeof(text)), size = KVD_SIGNATURE_BYTES;
    bool ok = k && c && EVP_DigestSignInit(c, NULL, NULL, NULL, k) == 1 &&
              EVP_DigestSign(c, out, &size, (const uint8_t *)text, n) == 1;
    EVP_MD_CTX_free(c);
    EVP_PKEY_free(k);
    if (!k)
        return err->code;
    return ok ? KVD_OK : kvd_fail(err, KVD_E_INTERNAL, "%s: signing failed", key);
}

int kvd_sign_verify(const char *public_key, const char *digest, const uint8_t *signature, size_t n,
                    struct kvd_error *err)
{
    EVP_PKEY *k = load_key(public_key, false, err);
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    char text[128];
    size_t size = message(digest, text, sizeof(text));
    bool ok = k && c && EVP_DigestVerifyInit(c, NULL, NULL, NULL, k) == 1 &&
              EVP_DigestVerify(c, signature, n, (const uint8_t *)text, size) == 1;
    EVP_MD_CTX_free(c);
    EVP_PKEY_free(k);
    if (!k)
        return err->code;
    return ok ? KVD_OK
              : kvd_fail(err, KVD_E_DENIED, "%s has a signature that is not of the key %s", digest,
                         public_key);
}

int kvd_sign_check_key(const char *public_key, struct kvd_error *err)
{
    EVP_PKEY *k = load_key(public_key, false, err);
    EVP_PKEY_free(k);
    return k ? KVD_OK : err->code;
}

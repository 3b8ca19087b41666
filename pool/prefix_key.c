// Keys of blocks. Every input to the hash begins with what kind it is and has parts of fixed or
// stated length, so no two different ones are the same bytes.
#include "pool/prefix.h"

#include <openssl/evp.h>

struct part {
    const void *bytes;
    size_t size;
};

static int hash(EVP_MD_CTX *c, const struct part *parts, size_t n, uint8_t out[32],
                struct kvd_error *err)
{
    bool ok = c && EVP_DigestInit_ex2(c, NULL, NULL) == 1;
    for (size_t i = 0; ok && i < n; i++)
        ok = EVP_DigestUpdate(c, parts[i].bytes, parts[i].size) == 1;
    if (!ok || EVP_DigestFinal_ex(c, out, NULL) != 1)
        return kvd_fail(err, KVD_E_INTERNAL, "SHA-256 failed");
    return KVD_OK;
}

// A context that hash() can use again and again: looking up the algorithm costs more than hashing.
static EVP_MD_CTX *context(void)
{
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    if (c && EVP_DigestInit_ex2(c, EVP_sha256(), NULL) != 1) {
        EVP_MD_CTX_free(c);
        c = NULL;
    }
    return c;
}

int kvd_prefix_domain_digest(const char *ns, const uint8_t layout_digest[32], const void *extra,
                             size_t extra_bytes, uint8_t out[KVD_PREFIX_DOMAIN_BYTES],
                             struct kvd_error *err)
{
    static const char kind[16] = "kvd domain 1";
    uint64_t size = strlen(ns);
    uint8_t n[8];
    for (int i = 0; i < 8; i++)
        n[i] = (uint8_t)(size >> 8 * i);
    const struct part parts[] = {{kind, sizeof(kind)},
                                 {layout_digest, 32},
                                 {n, sizeof(n)},
                                 {ns, size},
                                 {extra, extra ? extra_bytes : 0}};
    EVP_MD_CTX *c = context();
    int rc = hash(c, parts, KVD_LEN(parts), out, err);
    EVP_MD_CTX_free(c);
    return rc;
}

// Each key has the one before it in it, if they are chained.
static int hash_blocks(const char kind[16], const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                       const struct kvd_prefix_key *before, bool chained, const uint8_t *blocks,
                       size_t block_bytes, uint32_t n, struct kvd_prefix_key *out,
                       struct kvd_error *err)
{
    uint8_t head[16 + KVD_PREFIX_DOMAIN_BYTES + 1 + sizeof(struct kvd_prefix_key)] = {0};
    uint8_t digest[32], *first = head + 16 + KVD_PREFIX_DOMAIN_BYTES, *key = first + 1;
    memcpy(head, kind, 16);
    memcpy(head + 16, domain, KVD_PREFIX_DOMAIN_BYTES);
    *first = before ? 0 : 1;
    if (before)
        memcpy(key, before, sizeof(*before));
    EVP_MD_CTX *c = context();
    int rc = KVD_OK;
    for (uint32_t i = 0; i < n && rc == KVD_OK; i++) {
        const struct part parts[] = {{head, sizeof(head)}, {blocks + i * block_bytes, block_bytes}};
        rc = hash(c, parts, KVD_LEN(parts), digest, err);
        memcpy(&out[i], digest, sizeof(out[i]));
        if (!chained)
            continue;
        memcpy(key, digest, sizeof(out[i]));
        *first = 0;
    }
    EVP_MD_CTX_free(c);
    return rc;
}

static int check_key_bytes(uint32_t key_bytes, struct kvd_error *err)
{
    if (key_bytes >= KVD_MIN_BLOCK_KEY && key_bytes <= KVD_MAX_BLOCK_KEY)
        return KVD_OK;
    return kvd_fail(err, KVD_E_INVALID, "block keys of %u bytes: %d to %d are possible", key_bytes,
                    KVD_MIN_BLOCK_KEY, KVD_MAX_BLOCK_KEY);
}

int kvd_prefix_keys_of_blocks(const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                              const struct kvd_prefix_key *before, const uint8_t *block_keys,
                              uint32_t key_bytes, uint32_t n, struct kvd_prefix_key *out,
                              struct kvd_error *err)
{
    int rc = check_key_bytes(key_bytes, err);
    static const char kind[16] = "kvd block key 1";
    return rc ? rc : hash_blocks(kind, domain, before, true, block_keys, key_bytes, n, out, err);
}

int kvd_prefix_keys_of_pages(const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                             const uint8_t *page_keys, uint32_t key_bytes, uint32_t n,
                             struct kvd_prefix_key *out, struct kvd_error *err)
{
    int rc = check_key_bytes(key_bytes, err);
    static const char kind[16] = "kvd page key 1";
    return rc ? rc : hash_blocks(kind, domain, NULL, false, page_keys, key_bytes, n, out, err);
}

int kvd_prefix_keys_of_tokens(const uint8_t domain[KVD_PREFIX_DOMAIN_BYTES],
                              const struct kvd_prefix_key *before, const uint32_t *tokens,
                              uint32_t n, struct kvd_prefix_key *out, struct kvd_error *err)
{
    _Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tokens are hashed as they lie");
    static const char kind[16] = "kvd tokens 1";
    return hash_blocks(kind, domain, before, true, (const uint8_t *)tokens,
                       KVD_PAGE_TOKENS * sizeof(*tokens), n, out, err);
}

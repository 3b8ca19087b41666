#include "daemon/tier/block.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <xxhash.h>

#include "daemon/core/config_tiers.h"
#include "daemon/core/secret.h"
#include "daemon/tier/pinned.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "headers are little-endian");

enum { VERSION = 1, HAS_MAC = 1 };

struct header {
    char magic[8];
    uint32_t version, flags;
    uint64_t header_bytes, payload_bytes, stored;
    uint8_t key[KVD_TIER_KEY_BYTES], layout[32];
    uint8_t reserved[104]; // zero
    uint64_t checksum[2];  // of all before it and the payload
    uint8_t mac[32];       // of all before it and the payload
};
_Static_assert(sizeof(struct header) == KVD_BLOCK_HEADER, "the header has no padding");

static const char magic[8] = "KVDBLOCK";
static const char key_label[] = "kvd: a block's key on a tier, 1";

struct kvd_tier_secret {
    uint8_t bytes[KVD_SECRET_FILE_MAX];
    size_t n;
};

// -- the secret and keys ------------------------------------------------------------------------

struct kvd_tier_secret *kvd_tier_secret_load(const char *path, struct kvd_error *err)
{
    struct kvd_tier_secret *s = calloc(1, sizeof(*s));
    if (!s)
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    else if (kvd_secret_file_read(path, KVD_TIER_SECRET_MIN, s->bytes, &s->n, err))
        kvd_tier_secret_free(&s);
    return s;
}

void kvd_tier_secret_free(struct kvd_tier_secret **secret)
{
    if (*secret)
        OPENSSL_cleanse(*secret, sizeof(**secret));
    free(*secret);
    *secret = NULL;
}

struct piece {
    const void *data;
    size_t n;
};

static bool hmac(const struct kvd_tier_secret *secret, const struct piece *pieces, size_t n,
                 uint8_t out[32])
{
    EVP_PKEY *key = EVP_PKEY_new_raw_private_key(EVP_PKEY_HMAC, NULL, secret->bytes, secret->n);
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    size_t got = 32;
    bool good = key && c && EVP_DigestSignInit(c, NULL, EVP_sha256(), NULL, key) == 1;
    for (size_t i = 0; good && i < n; i++)
        good = EVP_DigestSignUpdate(c, pieces[i].data, pieces[i].n) == 1;
    good = good && EVP_DigestSignFinal(c, out, &got) == 1 && got == 32;
    EVP_MD_CTX_free(c);
    EVP_PKEY_free(key);
    return good;
}

// Looking up the algorithm, and preparing a secret, cost more than a key: that is done once.
struct kvd_tier_namer {
    EVP_MD_CTX *hash;   // without a secret,
    EVP_MAC_CTX *keyed; // and with one
};

static EVP_MD_CTX *hash_new(void)
{
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    if (c && EVP_DigestInit_ex2(c, EVP_sha256(), NULL) != 1) {
        EVP_MD_CTX_free(c);
        c = NULL;
    }
    return c;
}

static EVP_MAC_CTX *keyed_new(const struct kvd_tier_secret *secret)
{
    char digest[] = "SHA256";
    const OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, digest, 0),
        OSSL_PARAM_construct_end(),
    };
    EVP_MAC *mac = EVP_MAC_fetch(NULL, "HMAC", NULL);
    EVP_MAC_CTX *c = mac ? EVP_MAC_CTX_new(mac) : NULL;
    if (c && EVP_MAC_init(c, secret->bytes, secret->n, params) != 1) {
        EVP_MAC_CTX_free(c);
        c = NULL;
    }
    EVP_MAC_free(mac);
    return c;
}

struct kvd_tier_namer *kvd_tier_namer_new(const struct kvd_tier_secret *secret,
                                          struct kvd_error *err)
{
    struct kvd_tier_namer *n = calloc(1, sizeof(*n));
    if (n && secret)
        n->keyed = keyed_new(secret);
    else if (n)
        n->hash = hash_new();
    if (n && (n->keyed || n->hash))
        return n;
    free(n);
    kvd_fail(err, KVD_E_INTERNAL, "OpenSSL has no SHA-256, or no memory");
    return NULL;
}

void kvd_tier_namer_free(struct kvd_tier_namer **np)
{
    struct kvd_tier_namer *n = KVD_TAKE(*np);
    if (!n)
        return;
    EVP_MD_CTX_free(n->hash);
    EVP_MAC_CTX_free(n->keyed);
    free(n);
}

static bool digest(struct kvd_tier_namer *n, const void *text, size_t bytes, uint8_t out[32])
{
    size_t got = 0;
    if (n->keyed)
        return EVP_MAC_init(n->keyed, NULL, 0, NULL) == 1 &&
               EVP_MAC_update(n->keyed, text, bytes) == 1 &&
               EVP_MAC_final(n->keyed, out, &got, 32) == 1 && got == 32;
    return EVP_DigestInit_ex2(n->hash, NULL, NULL) == 1 &&
           EVP_DigestUpdate(n->hash, text, bytes) == 1 &&
           EVP_DigestFinal_ex(n->hash, out, NULL) == 1;
}

int kvd_tier_key_of(struct kvd_tier_namer *namer, const struct kvd_block_name *name,
                    struct kvd_tier_key *out, struct kvd_error *err)
{
    // All of fixed length: no two names give the same input.
    struct {
        char label[sizeof(key_label)];
        uint8_t domain[32], layout[32], key[24], plane[4];
    } text;
    _Static_assert(sizeof(text) == sizeof(key_label) + 92, "without padding");
    memcpy(text.label, key_label, sizeof(text.label));
    memcpy(text.domain, name->domain, sizeof(text.domain));
    memcpy(text.layout, name->layout, sizeof(text.layout));
    memcpy(text.key, name->key, sizeof(text.key));
    memcpy(text.plane, &name->plane, sizeof(text.plane));
    if (digest(namer, &text, sizeof(text), out->bytes))
        return KVD_OK;
    return kvd_fail(err, KVD_E_INTERNAL, "SHA-256 failed");
}

// -- blocks -------------------------------------------------------------------------------------

static uint64_t padded(uint64_t bytes)
{
    return KVD_BLOCK_FRONT + kvd_round_up(bytes, KVD_BLOCK_FRONT);
}

struct kvd_block *kvd_block_new(uint64_t bytes)
{
    return kvd_block_new_in(NULL, bytes);
}

struct kvd_block *kvd_block_new_in(struct kvd_pinned *memory, uint64_t bytes)
{
    struct kvd_block *b = bytes && bytes <= KVD_BLOCK_MAX ? calloc(1, sizeof(*b)) : NULL;
    uint8_t *front = NULL;
    if (b)
        front = memory ? kvd_pinned_take(memory, padded(bytes), &b->chunk)
                       : aligned_alloc(KVD_BLOCK_FRONT, padded(bytes));
    if (!front) {
        free(b);
        return NULL;
    }
    memset(front, 0, KVD_BLOCK_FRONT);
    b->memory = memory;
    b->front = front;
    b->payload = front + KVD_BLOCK_FRONT;
    b->bytes = bytes;
    memset(b->payload + bytes, 0, padded(bytes) - KVD_BLOCK_FRONT - bytes);
    atomic_init(&b->refs, 1);
    pthread_mutex_init(&b->lock, NULL);
    return b;
}

uint64_t kvd_block_place(const struct kvd_block *block)
{
    return block->chunk ? kvd_pinned_place(block->chunk) : 0;
}

struct kvd_block *kvd_block_ref(struct kvd_block *block)
{
    atomic_fetch_add_explicit(&block->refs, 1, memory_order_relaxed);
    return block;
}

void kvd_block_unref(struct kvd_block **block)
{
    struct kvd_block *b = KVD_TAKE(*block);
    if (!b || atomic_fetch_sub_explicit(&b->refs, 1, memory_order_acq_rel) != 1)
        return;
    pthread_mutex_destroy(&b->lock);
    if (b->memory)
        kvd_pinned_give(b->memory, b->chunk, b->front);
    else
        free(b->front);
    free(b);
}

uint8_t *kvd_block_value(const struct kvd_block *block, size_t *bytes)
{
    *bytes = KVD_BLOCK_HEADER + block->bytes;
    return block->payload - KVD_BLOCK_HEADER;
}

uint8_t *kvd_block_padded(const struct kvd_block *block, size_t *bytes)
{
    *bytes = padded(block->bytes);
    return block->front;
}

static struct header *header_of(const struct kvd_block *block)
{
    return (struct header *)(block->payload - KVD_BLOCK_HEADER);
}

uint64_t kvd_block_stored(const uint8_t *header, size_t bytes)
{
    struct header h;
    if (bytes < sizeof(h))
        return 0;
    memcpy(&h, header, sizeof(h));
    return memcmp(h.magic, magic, sizeof(magic)) ? 0 : h.stored;
}

static bool checksum(const struct kvd_block *block, const struct header *h, uint64_t out[2])
{
    XXH3_state_t *state = XXH3_createState();
    if (!state)
        return false;
    XXH3_128bits_reset(state);
    XXH3_128bits_update(state, h, offsetof(struct header, checksum));
    XXH3_128bits_update(state, block->payload, block->bytes);
    XXH128_hash_t sum = XXH3_128bits_digest(state);
    XXH3_freeState(state);
    out[0] = sum.low64;
    out[1] = sum.high64;
    return true;
}

static bool mac(const struct kvd_block *block, const struct header *h,
                const struct kvd_tier_secret *secret, uint8_t out[32])
{
    const struct piece pieces[] = {{h, offsetof(struct header, mac)},
                                   {block->payload, block->bytes}};
    return hmac(secret, pieces, KVD_LEN(pieces), out);
}

static int seal(struct kvd_block *block, const struct kvd_tier_secret *secret,
                const struct kvd_tier_key *key, const uint8_t layout[32], uint64_t now,
                struct kvd_error *err)
{
    struct header *h = header_of(block);
    if (block->sealed && memcmp(h->key, key->bytes, sizeof(h->key)) != 0)
        return kvd_fail(err, KVD_E_INVALID, "the block was put under another key already");
    if (block->sealed)
        return KVD_OK;
    *h = (struct header){.version = VERSION,
                         .flags = secret ? HAS_MAC : 0,
                         .header_bytes = KVD_BLOCK_HEADER,
                         .payload_bytes = block->bytes,
                         .stored = now};
    memcpy(h->magic, magic, sizeof(magic));
    memcpy(h->key, key->bytes, sizeof(h->key));
    memcpy(h->layout, layout, sizeof(h->layout));
    if (!checksum(block, h, h->checksum))
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (secret && !mac(block, h, secret, h->mac))
        return kvd_fail(err, KVD_E_INTERNAL, "OpenSSL has no HMAC-SHA-256");
    block->sealed = true;
    return KVD_OK;
}

int kvd_block_seal(struct kvd_block *block, const struct kvd_tier_secret *secret,
                   const struct kvd_tier_key *key, const uint8_t layout[32], uint64_t now,
                   struct kvd_error *err)
{
    pthread_mutex_lock(&block->lock);
    int rc = seal(block, secret, key, layout, now, err);
    pthread_mutex_unlock(&block->lock);
    return rc;
}

static const char *what_is_wrong(const struct kvd_block *block, const struct header *h,
                                 const struct kvd_tier_secret *secret,
                                 const struct kvd_tier_key *key, const uint8_t layout[32])
{
    static const uint8_t zeros[sizeof(h->reserved)];
    uint64_t sum[2];
    uint8_t code[32];
    if (memcmp(h->magic, magic, sizeof(magic)) != 0)
        return "it does not begin as a block does";
    if (h->version != VERSION || h->header_bytes != KVD_BLOCK_HEADER ||
        memcmp(h->reserved, zeros, sizeof(zeros)) != 0)
        return "it is of another version";
    if (h->payload_bytes != block->bytes)
        return "it is of another length";
    if (memcmp(h->key, key->bytes, sizeof(h->key)) != 0)
        return "it is another key's";
    if (memcmp(h->layout, layout, sizeof(h->layout)) != 0)
        return "it is of another layout";
    if (h->flags != (secret ? HAS_MAC : 0))
        return secret ? "it has no MAC" : "it has a MAC, and no secret is configured";
    if (!checksum(block, h, sum) || memcmp(sum, h->checksum, sizeof(sum)) != 0)
        return "its checksum does not match";
    if (secret && (!mac(block, h, secret, code) || CRYPTO_memcmp(code, h->mac, sizeof(code)) != 0))
        return "its MAC does not match";
    return NULL;
}

int kvd_block_verify(struct kvd_block *block, const struct kvd_tier_secret *secret,
                     const struct kvd_tier_key *key, const uint8_t layout[32], uint64_t now,
                     uint64_t ttl, struct kvd_error *err)
{
    const struct header *h = header_of(block);
    const char *wrong = what_is_wrong(block, h, secret, key, layout);
    if (wrong)
        return kvd_fail(err, KVD_E_CORRUPT, "%s", wrong);
    if (ttl && now > h->stored && now - h->stored > ttl)
        return kvd_fail(err, KVD_E_NOT_FOUND, "it has expired");
    block->sealed = true; // and may be put elsewhere
    return KVD_OK;
}

// A block as it is on a tier: a header in front of the bytes of its pages, the same in host memory,
// in a file and on a server. What does not verify is never served.
//
//   header (256 bytes): magic, version, flags, lengths, time, key, layout, checksum, MAC
//   payload: as the pool has it, compressed
//
// The key on a tier is a digest of all that says what the bytes are, so that neither namespaces,
// layouts nor formats can meet; with a secret it is a keyed digest, so that two who share a server
// with different secrets do not meet either, and keys tell nothing to who can list them. The
// checksum (XXH3, 128 bits) finds what hardware and crashes do, the MAC (HMAC-SHA-256) what people
// do. Any thread.
#ifndef KVD_DAEMON_TIER_BLOCK_H
#define KVD_DAEMON_TIER_BLOCK_H

#include <pthread.h>
#include <stdatomic.h>

#include "proto/base.h"

enum {
    KVD_TIER_KEY_BYTES = 32,
    KVD_TIER_KEY_TEXT = 2 * KVD_TIER_KEY_BYTES + 1,
    KVD_BLOCK_HEADER = 256,
    KVD_BLOCK_FRONT = 4096, // the header is at its end, so that the payload is aligned for disks
    KVD_BLOCK_MAX = 256 << 20,
};

struct kvd_tier_key {
    uint8_t bytes[KVD_TIER_KEY_BYTES];
};

// What a block is, beside its bytes.
struct kvd_block_name {
    uint8_t domain[32]; // of the prefix index: namespace, layout, and what the caller adds
    uint8_t layout[32]; // digest
    uint8_t key[24];    // of the prefix index: these 64 tokens and all before them
    uint32_t plane;
};

// A secret for MACs. NULL stands for none.
struct kvd_tier_secret;
// Reads it from a file (core/secret.h), of at least 32 bytes. NULL with *err set.
struct kvd_tier_secret *kvd_tier_secret_load(const char *path, struct kvd_error *err);
void kvd_tier_secret_free(struct kvd_tier_secret **secret);

// Makes keys, with a secret or without (NULL), which it does not keep. One thread at a time. NULL
// with *err set: KVD_E_INTERNAL.
struct kvd_tier_namer;
struct kvd_tier_namer *kvd_tier_namer_new(const struct kvd_tier_secret *secret,
                                          struct kvd_error *err);
// *namer may be NULL and becomes NULL.
void kvd_tier_namer_free(struct kvd_tier_namer **namer);
// KVD_E_INTERNAL: the library failed.
int kvd_tier_key_of(struct kvd_tier_namer *namer, const struct kvd_block_name *name,
                    struct kvd_tier_key *out, struct kvd_error *err);

struct kvd_pinned; // pinned.h
struct kvd_pinned_chunk;

struct kvd_block {
    uint8_t *payload; // KVD_BLOCK_FRONT-aligned; not to be written once the block was put
    uint64_t bytes;   // of the payload
    // -- block.c's
    struct kvd_pinned *memory; // that it is in; NULL: malloc's
    struct kvd_pinned_chunk *chunk;
    uint8_t *front;
    atomic_uint refs;
    pthread_mutex_t lock;
    bool sealed;
};

// A block with room for `bytes` of payload and one reference, the caller's. NULL: out of memory, or
// not 1 to KVD_BLOCK_MAX bytes.
struct kvd_block *kvd_block_new(uint64_t bytes);
// The same in memory that comes from there and goes back; with NULL in malloc's.
struct kvd_block *kvd_block_new_in(struct kvd_pinned *memory, uint64_t bytes);
// Which pinned memory it is in: blocks for which it is the same may be copied at once. 0: in none.
uint64_t kvd_block_place(const struct kvd_block *block);
struct kvd_block *kvd_block_ref(struct kvd_block *block);
// Gives the reference up; *block may be NULL and becomes NULL.
void kvd_block_unref(struct kvd_block **block);

// Header and payload in one piece.
uint8_t *kvd_block_value(const struct kvd_block *block, size_t *bytes);
// The same with zeros in front and behind up to whole multiples of KVD_BLOCK_FRONT.
uint8_t *kvd_block_padded(const struct kvd_block *block, size_t *bytes);

// Writes the header, once: later calls find it written. `now` is Unix time. KVD_E_INVALID: it has
// one for another key. KVD_E_INTERNAL.
int kvd_block_seal(struct kvd_block *block, const struct kvd_tier_secret *secret,
                   const struct kvd_tier_key *key, const uint8_t layout[32], uint64_t now,
                   struct kvd_error *err);
// When a block was sealed, in Unix time, by the beginning of its file or value, as it says itself;
// 0: it is none. Nothing is verified.
uint64_t kvd_block_stored(const uint8_t *header, size_t bytes);
// Whether header and payload are what was asked for, all of it and unchanged. KVD_E_CORRUPT: what
// is wrong. KVD_E_NOT_FOUND: stored more than `ttl` seconds ago (0: no limit).
int kvd_block_verify(struct kvd_block *block, const struct kvd_tier_secret *secret,
                     const struct kvd_tier_key *key, const uint8_t layout[32], uint64_t now,
                     uint64_t ttl, struct kvd_error *err);

#endif

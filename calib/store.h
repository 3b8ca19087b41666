// The calibration store: where rotation sets are fetched from, and the local cache of what was
// fetched.
//
// A store is a directory that any static HTTP server can serve:
//   index.json                        {"models": ["Qwen/Qwen3-8B", ...]}
//   models/<model>.json               {"model": ..., "tags": {"<tag>": {"digest": "sha256:...",
//   "bytes": n, shape, objective, provenance, evaluation}}}
//   objects/sha256/<hex>.safetensors  native rotation sets, named by the digest of the file
//   objects/sha256/<hex>.sig          a signature (calib/sign.h), if there is one
// A cache has objects/ likewise, and below stores/<hash of the URL>/ the index and manifests of
// each store, with a link to objects/, so that such a folder can be served as that store. A file
// enters the cache only when it is complete, has the digest that was asked for and passes
// kvd_rotset_check.
//
// All calls block and may be made from any thread, several at a time.
#ifndef KVD_CALIB_STORE_H
#define KVD_CALIB_STORE_H

#include <jansson.h>

#include "calib/rotset.h"

struct kvd_store_config {
    const char
        *url; // "file:///path", "/path", "http://..." or "https://..."; NULL or "": only the cache
    const char *cache;   // directory, made if need be
    uint32_t timeout_ms; // for one transfer; 0: 60,000. A server that sends less than 1 KiB/s for
                         // 10 s is given up earlier.
    const char
        *public_key; // PEM, Ed25519: only sets signed by its private key are taken; NULL or "": any
    uint32_t retries;   // after the first try, with growing pauses; counts network failures and 5xx
    const char *option; // for messages: how its owner names a store; NULL: as kvd's is named
    // Set by any thread when nobody wants it any more: transfers fail with KVD_E_UNAVAILABLE within
    // about a second. NULL: never.
    const _Atomic bool *given_up;
};

struct kvd_store_entry {
    char model[KVD_MAX_NAME + 1];
    char tag[KVD_MAX_NAME + 1];
    char digest[KVD_DIGEST_TEXT];
    uint64_t bytes;
    // What the publisher's evaluation says: the relative error of attention's outputs, with the
    // bf16 windows and without; 0: it says nothing.
    double error, error_no_windows;
    bool cached;
};

// Where a set came from, for logs and metrics.
enum kvd_store_source {
    KVD_STORE_CACHE,
    KVD_STORE_REMOTE,
};

// Told about bytes received; may be NULL. total is 0 when not known.
typedef void kvd_store_progress(void *ctx, uint64_t have, uint64_t total);

// True if `ref` is "model@tag" or "sha256:<hex>". Model and tag: letters, digits, '.', '_', '-',
// and '/' in models; no part begins with a dot.
bool kvd_store_ref_valid(const char *ref);

// Gets a set, by the model's name in the store if `ref` has one: from the cache when its digest is
// known and present, else from the store. When the store cannot be reached, a tag is resolved from
// its cached manifest; without a URL, from those of all stores in the cache, if they agree
// (KVD_E_PRECONDITION names those that do not). KVD_E_NOT_FOUND (no such model, tag or object),
// KVD_E_UNAVAILABLE (store unreachable and not cached), KVD_E_CORRUPT (failed verification; nothing
// is kept), KVD_E_DENIED (not signed by the configured key), KVD_E_LIMIT (too large), a negative
// errno (cache not writable, disk full). *source may be NULL.
int kvd_store_fetch(const struct kvd_store_config *config, const char *ref,
                    kvd_store_progress *progress, void *ctx, struct kvd_rotset **out,
                    enum kvd_store_source *source, struct kvd_error *err);

// Lists what the store's index says, or without a URL those of all stores in the cache. *entries is
// the caller's to free. An unreachable store is no error if the cache has something of it.
int kvd_store_list(const struct kvd_store_config *config, struct kvd_store_entry **entries,
                   uint32_t *n, struct kvd_error *err);

// Whether a store is a folder that is not there, as one that is not mounted: nobody knows what it
// has.
bool kvd_store_away(const char *url);

// Makes every transfer that is under way, and every later one, fail with KVD_E_UNAVAILABLE within
// about a second: for a process that stops. Any thread.
void kvd_store_abort(void);

// Marks a set of the cache, fetching it if need be, so that kvd_store_gc leaves it; or, with
// `pinned` false, takes the mark off. Errors as kvd_store_fetch.
int kvd_store_pin(const struct kvd_store_config *config, const char *ref, bool pinned,
                  char digest[KVD_DIGEST_TEXT], struct kvd_error *err);

struct kvd_store_gc {
    uint32_t kept, removed; // objects
    uint64_t freed;         // bytes
};

// Removes from the cache the sets that no cached manifest's tag names and no pin marks, and what
// fetches that were cut short left behind a day ago. With `dry`, only counts. KVD_E_CORRUPT when a
// manifest cannot be read: what it names is not known then, and nothing is removed.
int kvd_store_collect(const struct kvd_store_config *config, bool dry, struct kvd_store_gc *out,
                      struct kvd_error *err);

struct kvd_publish_options {
    const char *model, *tag; // what the store calls it, whatever the set's own file says
    const char *file;   // native, that the set was read from: published as it is; NULL: one is made
    bool replace;       // the tag may name another set
    const char *key;    // file of a private key to sign with; NULL: no signature
    json_t *evaluation; // goes into the manifest beside the set's shape; NULL: none
};

// Writes a set into a directory store under model@tag, with its manifests. Sets set->digest where
// it is not known. KVD_E_EXISTS when the tag names another set and may not be moved, KVD_E_CORRUPT
// when a manifest there cannot be read or the file changed; the store is then as it was.
int kvd_store_publish(const char *directory, struct kvd_rotset *set,
                      const struct kvd_publish_options *o, struct kvd_error *err);

// Takes a tag out of a directory store. The set's object stays, for those who name it by digest.
// digest: what the tag named. KVD_E_NOT_FOUND: there is no such model or tag.
int kvd_store_untag(const char *directory, const char *ref, char digest[KVD_DIGEST_TEXT],
                    struct kvd_error *err);

#endif

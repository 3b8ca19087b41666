/** @file
 * Prompts: blocks that others have computed. Part of kvd/kvd.h, which includes it. */
#ifndef KVD_KVD_H
#error "include kvd/kvd.h"
#endif
#ifndef KVD_PROMPTS_H
#define KVD_PROMPTS_H

/** Bytes of whatever kind. */
typedef struct kvd_bytes {
    const void *data; /**< not NULL, unless bytes is 0 */
    uint64_t bytes;   /**< how many */
} kvd_bytes;
/** Names the blocks of a prompt, 64 tokens each, from its first token on: by keys of the caller's
 * own, or by tokens. What is named one way is not found the other way. Keys mean something within
 * the namespace, for clients of the same layout, codec, rotation set and windows, and of the same
 * extras. Tokens behind the last whole block name nothing. */
typedef struct kvd_prompt {
    uint32_t size;           /**< sizeof(kvd_prompt) */
    const void *block_keys;  /**< keys, one after the other; NULL: there are tokens */
    uint32_t key_bytes;      /**< of each, 16 to 40 */
    uint32_t blocks;         /**< how many keys, at most 4,096 */
    const uint32_t *tokens;  /**< ids; NULL: there are keys */
    uint32_t n_tokens;       /**< how many, at most 262,207 */
    const kvd_bytes *extras; /**< what else decides about K and V: the model's revision, a salt,
                                adapters by content, media; may be NULL */
    uint32_t n_extras; /**< how many, at most 16, of 1,024 bytes together; their order counts */
} kvd_prompt;
/** Why a block is not there. */
typedef enum kvd_miss {
    KVD_MISS_NONE = 0,      /**< all are */
    KVD_MISS_UNKNOWN,       /**< never published, or gone for so long that nothing is known */
    KVD_MISS_EVICTED_ROOM,  /**< memory was wanted */
    KVD_MISS_EVICTED_QUOTA, /**< the namespace's quota was reached */
    KVD_MISS_EVICTED_INDEX, /**< the namespace's index was full */
    KVD_MISS_DROPPED,       /**< an operator dropped it */
    KVD_MISS_DAMAGED,       /**< it did not verify */
    KVD_MISS_OTHER_EXTRA,   /**< the first block is there, with other extras only */
    KVD_MISS_OTHER_LAYOUT,  /**< the first block is there, in another layout only */
    KVD_MISS_EVICTED_ASKED, /**< an operator wanted memory back */
    KVD_MISS_EXPIRED,       /**< the time that it was stored for was over */
    KVD_MISS_SUPERSEDED,    /**< of a page that was exact: it is there encoded since */
} kvd_miss;
/** What is there of a prompt. */
typedef struct kvd_match {
    uint32_t size;   /**< sizeof(kvd_match) */
    uint32_t blocks; /**< leading blocks that a sequence can be made of */
    uint32_t known;  /**< leading blocks that are known; the pages of some may be gone */
    uint32_t
        window_tokens; /**< tokens before that cut that are in bf16 in all planes, sink apart */
    bool end;          /**< the cut is a published end: going on gives the same bits */
    uint64_t lease;    /**< number to adopt or release it by; 0: none */
    kvd_miss miss;     /**< why the first block that is not known is not */
    uint32_t missed;   /**< when that went, in seconds of Unix time; 0: not known */
    uint32_t restored; /**< blocks that were brought back from tiers for this */
    /** blocks with which more leading ones could be had, and that the pool lacked, by the farthest
     * tier that has part of each: host memory, a directory, a server. Zeros: none, or they were not
     * looked for */
    uint32_t behind[3];
} kvd_match;
/** How prompts are looked up. */
typedef struct kvd_match_options {
    uint32_t size;       /**< sizeof(kvd_match_options) */
    uint32_t lease_ms;   /**< milliseconds for which what is found stays, at most 600,000; 0: it may
                            go at once */
    uint32_t restore_ms; /**< milliseconds, at most 600,000, for which what tiers have is brought
                            back first; what has not come then, or does not verify, is a miss. 0:
                            nothing is */
    uint32_t wait_ms;    /**< of a single prompt: whoever misses a block has claimed the rest for so
                            many milliseconds, at most 600,000, and is to compute and publish it;
                            whoever finds it claimed by another session waits as long, until it is
                            published or that session ends. 0: neither */
    bool tiers;          /**< tells what is behind the pool, as restore_ms does */
    bool quiet;          /**< does not count as used */
    bool recompute_window; /**< of prompts: matches end a recent window earlier, unless that is
                              where a published end is. Whoever computes the tokens behind it has
                              that window in bf16 again */
} kvd_match_options;
/** Looks up prompts. The client's timeout is that of the call beyond restore_ms and wait_ms.
 * @param client whose
 * @param prompts what to look up, [count]
 * @param count how many prompts, 1 to 256, of at most 65,536 blocks together
 * @param options how; NULL: all zero
 * @param[in,out] out what is there of each, [count]; the first one's size is read. Each lease ends
 * by kvd_prompt_adopt, kvd_leases_release, its time, or with the session
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a prompt is none, or a number out of range
 * @retval KVD_ERR_EXHAUSTED the session or the namespace has too many leases */
KVD_API kvd_result kvd_prompts_match(kvd_client *client, const kvd_prompt *prompts, uint32_t count,
                                     const kvd_match_options *options, kvd_match *out,
                                     kvd_failure *err);
/** Makes a sequence of leased blocks, which this session holds. Nothing is copied: it shares pages
 * until it writes there. The lease ends.
 * @param client whose
 * @param lease number of a lease that it has
 * @param blocks how many of the leading blocks; 0: all that were found
 * @param[out] sequence its id; to be freed by kvd_sequences_free, or with the session
 * @param[out] length tokens of it
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_NOT_FOUND the lease is over
 * @retval KVD_ERR_PRECONDITION more blocks than were found, or a plane's window lacks pages there
 * @retval KVD_ERR_EXHAUSTED the session or the namespace has too many sequences */
KVD_API kvd_result kvd_prompt_adopt(kvd_client *client, uint64_t lease, uint32_t blocks,
                                    uint64_t *sequence, uint64_t *length, kvd_failure *err);
/** Ends leases; those that are over are passed over.
 * @param client whose
 * @param leases the number of each, [count]
 * @param count how many leases, 1 to 4,096
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID count is out of range */
KVD_API kvd_result kvd_leases_release(kvd_client *client, const uint64_t *leases, uint32_t count,
                                      kvd_failure *err);
/** What a program knows of how prompts will be used. */
typedef enum kvd_hint {
    KVD_HINT_RETAIN = 0, /**< they stay for a time, also beyond the session */
    KVD_HINT_DEMOTE,     /**< their last blocks are the first to go, until they are used; up to the
                            first that has others behind it too */
    KVD_HINT_PREFETCH,   /**< what tiers have is brought back meanwhile, and stays for a time */
    KVD_HINT_LOW,        /**< they go before others of the namespace, whatever their use says */
    KVD_HINT_NORMAL,     /**< they are as others again; all are, until something else is said */
    KVD_HINT_HIGH,       /**< they go after others of the namespace. A class ends with kvd */
} kvd_hint;
/** Tells kvd how prompts will be used.
 * @param client whose
 * @param prompts of which it tells, [count]
 * @param count how many prompts, 1 to 256, of at most 65,536 blocks together
 * @param hint what
 * @param ms milliseconds for which they stay, at most 86,400,000; 0: no longer, or, of PREFETCH,
 * they may go at once. Of DEMOTE, LOW, NORMAL and HIGH 0
 * @param expire of RETAIN: they are dropped afterwards, from tiers too
 * @param[out] blocks of each prompt the leading blocks that are there and stay, or how many are
 * demoted or of that class now, [count]; NULL: not wanted
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a prompt is none, or a number out of range
 * @retval KVD_ERR_EXHAUSTED the namespace has too many leases, or prefetches under way; what was
 * said of prompts before is done */
KVD_API kvd_result kvd_prompts_hint(kvd_client *client, const kvd_prompt *prompts, uint32_t count,
                                    kvd_hint hint, uint32_t ms, bool expire, uint32_t *blocks,
                                    kvd_failure *err);
/** What was published of a prompt. */
typedef struct kvd_published {
    uint32_t size;   /**< sizeof(kvd_published) */
    uint32_t blocks; /**< leading blocks that are known now */
    uint32_t known;  /**< of those, blocks that were known before */
    bool end;        /**< there is an end */
} kvd_published;
/** Gives a sequence's blocks to others, as far as they are whole, in every layer, and behind the
 * recent window. Can be called again and again while the sequence grows.
 * @param client whose
 * @param sequence id of one that it holds
 * @param prompt names its blocks; more than it has is no mistake
 * @param end whether to go up to the last whole block, and keep the recent window there as it is:
 * whoever adopts there goes on with the same bits
 * @param[in,out] out its size is read
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID the prompt is none, or the layout's sink is no multiple of 64 tokens
 * @retval KVD_ERR_NOT_FOUND the session does not hold the sequence
 * @retval KVD_ERR_PRECONDITION with end: it is amid an append, or used by a call in flight
 * @retval KVD_ERR_EXHAUSTED with end: the namespace has too many sequences */
KVD_API kvd_result kvd_prompt_publish(kvd_client *client, uint64_t sequence,
                                      const kvd_prompt *prompt, bool end, kvd_published *out,
                                      kvd_failure *err);

#endif

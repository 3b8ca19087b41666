/** @file
 * Pages: blocks of 64 tokens of an engine that keeps KV of its own, in its own blocks and under its
 * own keys. Part of kvd/kvd.h, which includes it.
 *
 * For clients that were opened with `pages`, at a unix: address, whose layers are alike. Any page
 * can be looked up, put and got without those before it. A key must name a page and all before it.
 * Keys mean something within the namespace, the layout and a space: 1 to 1,024 bytes that say what
 * else decides about K and V (a digest of the weights' revision, RoPE, adapters by content, the
 * engine and how it hashes, a part of the layers).
 *
 * Pages are kept encoded, in the client's codec, or exact, in bf16. Where there are both, the exact
 * one counts. What is there is not put again.
 *
 * Functions may be called from several threads at once; memory that they write must not be used
 * meanwhile. Those that put and get wait for kvd; a kvd_queue does it instead of the caller. */
#ifndef KVD_KVD_H
#error "include kvd/kvd.h"
#endif
#ifndef KVD_PAGES_H
#define KVD_PAGES_H

/** What there is of a page. */
typedef enum kvd_stored {
    KVD_STORED_NONE = 0, /**< nothing */
    KVD_STORED_ENCODED,  /**< it, in the client's codec */
    KVD_STORED_EXACT,    /**< it, in bf16 */
} kvd_stored;

/** Names pages. */
typedef struct kvd_page_keys {
    uint32_t size;      /**< sizeof(kvd_page_keys) */
    const void *keys;   /**< the engine's, one after the other */
    uint32_t key_bytes; /**< of each, 16 to 40 */
    uint32_t pages;     /**< how many pages, at most 4,096 */
    /** for puts: the key of the page before the first; NULL: none. Eviction takes pages before
     * those that they were put behind; it need not be there. */
    const void *after;
    /** for puts: for each page a kvd_stored that a lookup has found of it. Then kvd is not asked
     * once more: pages that were there are left as they were, and all others are sent, of which kvd
     * keeps those that are not there after all. NULL: kvd is asked */
    const uint8_t *had;
} kvd_page_keys;

/** What is there of the pages that were looked up. */
typedef struct kvd_found {
    uint32_t size;      /**< sizeof(kvd_found) */
    uint32_t pages;     /**< leading pages that are there */
    uint64_t lease;     /**< number to release it by; 0: none */
    uint8_t *kinds;     /**< NULL, or room for a kvd_stored for each key, which is written */
    uint32_t restored;  /**< pages that were brought back from tiers for this */
    uint32_t behind[3]; /**< pages that the pool lacked and tiers had, as kvd_match has it */
} kvd_found;

/** Distances in bytes. */
typedef struct kvd_strides {
    uint64_t block; /**< bytes from a block to the next */
    uint64_t head;  /**< bytes from a head to the next */
    uint64_t token; /**< bytes from a token of a block to the next */
    uint64_t dim;   /**< bytes from an element of a head to the next */
} kvd_strides;

/** An engine's KV in this process's memory or the GPU's, bf16, and the blocks of it that pages are
 * read from or written to: tokens first_token, first_token + 1, ... of the listed blocks, one after
 * the other.
 */
typedef struct kvd_paged {
    uint32_t size;          /**< sizeof(kvd_paged) */
    void *const *k;         /**< for each layer of the client, where K begins */
    void *const *v;         /**< the same of V */
    uint64_t k_bytes;       /**< bytes of memory from each k on */
    uint64_t v_bytes;       /**< bytes of memory from each v on */
    kvd_strides k_strides;  /**< bytes; of dim and token one at least is 2 */
    kvd_strides v_strides;  /**< the same of V */
    uint32_t all_blocks;    /**< how many blocks the memory has */
    uint32_t block_tokens;  /**< tokens of a block, 1 to 1,024 */
    const uint32_t *blocks; /**< number of each, in the order of the tokens */
    uint32_t n_blocks;      /**< how many blocks; more than are used is no mistake */
    uint32_t first_token;   /**< number of the first token in the first block */
    bool on_gpu;            /**< k and v are memory of the GPU that kvd runs on */
    void *stream; /**< then the cudaStream_t that the blocks are read or written on, behind
                   * what is on it; calls wait for it. NULL: the default stream */
} kvd_paged;

/** Registers an engine's KV with kvd, once: the allocations that K and V of all layers lie in. From
 * then on kvd's own kernels read and write the pages of it that this client puts and gets, also by
 * its queues, and nothing is copied in this process. It changes nothing else: calls that name
 * memory that is not registered have libkvd copy.
 *
 * kvd has the memory mapped until kvd_pages_unregister, or the client's end: it must not be given
 * back before, nor unmapped, as an engine's sleep mode does. After a restart of kvd it is
 * registered again by itself, as other buffers are.
 * @param client whose puts and gets
 * @param memory k, v, k_bytes, v_bytes and on_gpu say what; the rest has no meaning here. On a GPU
 * it is what kvd_buffer_cuda takes: memory of cudaMalloc, or an allocator above it, and mappings of
 * cuMemCreate (PyTorch's expandable_segments), of which each is shared once whatever tensors lie in
 * it. Memory of the host is registered by being
 * kvd_buffer_new's, so that this only says whether it is
 * @param[out] err says why it failed; may be NULL. Then nothing is registered that was not
 * @retval KVD_ERR_INVALID it is no such memory, or not of what kvd computes in; this kvd is too
 * old; or libkvd has no CUDA
 * @retval KVD_ERR_PRECONDITION the client was opened without pages, or kvd runs on another GPU
 * @retval KVD_ERR_EXHAUSTED the session has too many buffers, or the user too many mappings */
KVD_API kvd_result kvd_pages_register(kvd_client *client, const kvd_paged *memory,
                                      kvd_failure *err);
/** Gives back what kvd_pages_register has registered of this client, all of it. Puts and gets that
 * begin meanwhile, or that wait in a queue, have libkvd copy. When it returns well, none of them
 * uses the memory any more, and kvd, if it answered within the client's timeout, has let go of it.
 * @param client whose
 * @param ms milliseconds to wait for puts and gets that are under way
 * @param[out] err says why it failed; may be NULL. Then all stays registered
 * @retval KVD_ERR_TIMEOUT some are still under way */
KVD_API kvd_result kvd_pages_unregister(kvd_client *client, uint32_t ms, kvd_failure *err);
/** Looks up pages of several requests. What is found counts as used.
 * @param client whose
 * @param space what the keys mean something in
 * @param requests what to look up, [count]; all keys have the same bytes
 * @param count how many requests, 1 to 256, of at most 65,536 pages together
 * @param options how, without waiting for others; NULL: all zero
 * @param[in,out] out what is there of each, [count]; the size of each is read. Each lease ends by
 * kvd_leases_release, its time, or with the session
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a space, a request or a number is out of range
 * @retval KVD_ERR_PRECONDITION the client was opened without pages
 * @retval KVD_ERR_EXHAUSTED the session or the namespace has too many leases */
KVD_API kvd_result kvd_pages_lookup(kvd_client *client, const kvd_bytes *space,
                                    const kvd_page_keys *requests, uint32_t count,
                                    const kvd_match_options *options, kvd_found *out,
                                    kvd_failure *err);
/** Tells kvd how pages will be used, wherever they are in a request.
 * @param client whose
 * @param space what the keys mean something in
 * @param requests of which it tells, [count]; all keys have the same bytes
 * @param count how many requests, 1 to 256, of at most 65,536 pages together
 * @param hint what. What RETAIN says of a request is told by the last page of it that is there, and
 * replaces what was said of that before
 * @param ms milliseconds for which they stay, as kvd_prompts_hint has them
 * @param expire of RETAIN: they are dropped afterwards, from tiers too, unless somebody keeps them
 * or they have others behind them that are not of the request
 * @param[out] pages of each request those that are there and stay, or how many are demoted or of
 * that class now, [count]: there those count twice that are there both ways. NULL: not wanted
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a space, a request or a number is out of range
 * @retval KVD_ERR_PRECONDITION the client was opened without pages
 * @retval KVD_ERR_EXHAUSTED the namespace has too many leases, or prefetches under way; what was
 * said of requests before is done */
KVD_API kvd_result kvd_pages_hint(kvd_client *client, const kvd_bytes *space,
                                  const kvd_page_keys *requests, uint32_t count, kvd_hint hint,
                                  uint32_t ms, bool expire, uint32_t *pages, kvd_failure *err);
/** Stores pages that are not there. Each is seen whole or not at all; where two put one key at
 * once, the first stays. After a failure some may have been stored.
 * @param client whose
 * @param space what the keys mean something in
 * @param keys names the pages
 * @param exact for each page: whether it is kept in bf16; NULL: none is
 * @param source what they are: 64 tokens for each page
 * @param[out] kinds for each page what is there now, a kvd_stored; NULL: not wanted. None: the
 * namespace's index has no room
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a number, stride or block is out of range; or K or V holds NaN or Inf
 * @retval KVD_ERR_PRECONDITION the client was opened without pages
 * @retval KVD_ERR_EXHAUSTED the quota, the pool or a limit */
KVD_API kvd_result kvd_pages_put(kvd_client *client, const kvd_bytes *space,
                                 const kvd_page_keys *keys, const bool *exact,
                                 const kvd_paged *source, uint8_t *kinds, kvd_failure *err);
/** Reads pages, into blocks that no other one of them, and nothing else in `target`, shares memory
 * with. All of them are there, or nothing is written; after another failure than NOT_FOUND the
 * blocks hold what they held, or part of the pages.
 * @param client whose
 * @param space what the keys mean something in
 * @param keys names the pages
 * @param target where to
 * @param[out] kinds for each page what was read, a kvd_stored; NULL: not wanted
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID a number, stride or block is out of range, or blocks overlap
 * @retval KVD_ERR_NOT_FOUND one is not there
 * @retval KVD_ERR_PRECONDITION the client was opened without pages
 * @retval KVD_ERR_EXHAUSTED the session or the namespace has too many leases or sequences */
KVD_API kvd_result kvd_pages_get(kvd_client *client, const kvd_bytes *space,
                                 const kvd_page_keys *keys, const kvd_paged *target, uint8_t *kinds,
                                 kvd_failure *err);
/** Tells kvd that a chain of pages has gone on: those that were put exactly, as they were its last
 * ones, are encoded, as putting them so would have encoded them. kvd leaves those as they are from
 * which exact pages that are not of the keys go on within 256 tokens: there another chain may end.
 * At any time a page is found, exact or encoded; what a lease has found exact stays so until the
 * lease ends.
 * @param client whose
 * @param space what the keys mean something in
 * @param keys pages of one chain that follow each other, at most 512. All but the last 4 may be
 * encoded, where the 4 behind them are there too; `after` has no meaning here
 * @param[out] kinds for each key what lookups find now, a kvd_stored; NULL: not wanted
 * @param[out] encoded pages that they found exact before, and find encoded now; NULL: not wanted
 * @param[out] err says why it failed; may be NULL. Then nothing has changed
 * @retval KVD_ERR_INVALID a number is out of range
 * @retval KVD_ERR_NOT_FOUND a page went meanwhile
 * @retval KVD_ERR_PRECONDITION the client was opened without pages
 * @retval KVD_ERR_CORRUPT an exact page is not what was stored
 * @retval KVD_ERR_EXHAUSTED the quota, the pool or a limit */
KVD_API kvd_result kvd_pages_encode(kvd_client *client, const kvd_bytes *space,
                                    const kvd_page_keys *keys, uint8_t *kinds, uint32_t *encoded,
                                    kvd_failure *err);

/** Puts and gets that a thread of libkvd's own does one after the other, in the order in which they
 * were queued. A queue waits for no other: with one for gets and one for puts, no get waits for a
 * put that was queued before it. kvd gives sessions turns, so to be apart there as well, the two
 * want a client each.
 *
 * What is queued is a ticket, until kvd_queue_poll has told how it ended or kvd_queue_cancel has
 * taken it back. Until then its `kinds` must stay, and the engine's blocks: those of a get must not
 * be used, and those of a put not be written. All else that is given is copied.
 *
 * Of blocks on the GPU, a ticket begins behind what was on kvd_paged.stream when it was queued,
 * and copies on a stream of the queue's own; what is put on any stream after it was told to have
 * ended is behind it. So no event is needed, and the engine's stream never waits.
 *
 * Where kvd is gone, does not answer or has lost the session, all tickets that wait end as the one
 * that found out did: KVD_ERR_UNAVAILABLE, KVD_ERR_TIMEOUT, KVD_ERR_LOST. To an engine these are
 * misses. Those that are queued later are tried again. */
typedef struct kvd_queue kvd_queue;

/** How a ticket ended. */
typedef struct kvd_ended {
    uint32_t size;       /**< sizeof(kvd_ended) */
    kvd_result result;   /**< what kvd_pages_put or kvd_pages_get would have returned */
    uint64_t ticket;     /**< its number */
    uint64_t us;         /**< how many microseconds it took; 0: it never began */
    kvd_failure failure; /**< says why it failed */
} kvd_ended;

/** Makes a queue and its thread.
 * @param client whose, with pages. kvd_close frees its queues as kvd_queue_free does
 * @param tickets how many there may be at once, those that have ended and were not polled included,
 * at most 4,096; 0: 256
 * @param[out] out the queue, to be freed by kvd_queue_free
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID tickets is out of range
 * @retval KVD_ERR_PRECONDITION the client was opened without pages */
KVD_API kvd_result kvd_queue_new(kvd_client *client, uint32_t tickets, kvd_queue **out,
                                 kvd_failure *err);
/** Tells the queue's eventfd, to be waited for by poll or epoll: it is readable while tickets have
 * ended that were not polled. Nobody but libkvd may read or write it.
 * @param queue whose
 * @param[out] fd number of the descriptor, which is the queue's and closed with it
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_PRECONDITION this is a forked child */
KVD_API kvd_result kvd_queue_fd(kvd_queue *queue, int *fd, kvd_failure *err);
/** Queues a kvd_pages_put, whose parameters these are. What is wrong with them shows at once.
 * @param queue where
 * @param space what the keys mean something in
 * @param keys names the pages
 * @param exact for each page: whether it is kept in bf16; NULL: none is
 * @param source what they are: 64 tokens for each page
 * @param[out] kinds written before it ends well: for each page what is there then, a kvd_stored;
 * NULL: not wanted
 * @param[out] ticket number of it, 1, 2, ... of a queue; NULL: not wanted
 * @param[out] err says why it failed; may be NULL. Then nothing was queued
 * @retval KVD_ERR_INVALID as kvd_pages_put
 * @retval KVD_ERR_EXHAUSTED as many tickets as there may be */
KVD_API kvd_result kvd_queue_put(kvd_queue *queue, const kvd_bytes *space,
                                 const kvd_page_keys *keys, const bool *exact,
                                 const kvd_paged *source, uint8_t *kinds, uint64_t *ticket,
                                 kvd_failure *err);
/** Queues a kvd_pages_get, whose parameters these are. What is wrong with them shows at once.
 * @param queue where
 * @param space what the keys mean something in
 * @param keys names the pages
 * @param target where to
 * @param[out] kinds written before it ends well: for each page what was read, a kvd_stored; NULL:
 * not wanted
 * @param[out] ticket number of it, 1, 2, ... of a queue; NULL: not wanted
 * @param[out] err says why it failed; may be NULL. Then nothing was queued
 * @retval KVD_ERR_INVALID as kvd_pages_get
 * @retval KVD_ERR_EXHAUSTED as many tickets as there may be */
KVD_API kvd_result kvd_queue_get(kvd_queue *queue, const kvd_bytes *space,
                                 const kvd_page_keys *keys, const kvd_paged *target, uint8_t *kinds,
                                 uint64_t *ticket, kvd_failure *err);
/** Tells which tickets have ended, each once, in the order in which they did. Waits for nothing.
 * @param queue whose
 * @param[in,out] out how they ended, [count]; the size of each is read
 * @param count how many there is room for, 1 or more
 * @param[out] n how many have been written
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID count is 0, or the size of an item is none */
KVD_API kvd_result kvd_queue_poll(kvd_queue *queue, kvd_ended *out, uint32_t count, uint32_t *n,
                                  kvd_failure *err);
/** Waits until a ticket touches nothing any more; kvd_queue_poll tells of it all the same.
 * @param queue whose
 * @param ticket number of one that was queued; one that was polled or taken back is over
 * @param ms milliseconds at most
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID no ticket has had that number
 * @retval KVD_ERR_TIMEOUT it is not over */
KVD_API kvd_result kvd_queue_wait(kvd_queue *queue, uint64_t ticket, uint32_t ms, kvd_failure *err);
/** Takes back a ticket that has not begun: it never will, and kvd_queue_poll does not tell of it.
 * @param queue whose
 * @param ticket number of it
 * @param[out] err says why it failed; may be NULL
 * @retval KVD_ERR_INVALID no ticket has had that number
 * @retval KVD_ERR_PRECONDITION it has begun, or is over */
KVD_API kvd_result kvd_queue_cancel(kvd_queue *queue, uint64_t ticket, kvd_failure *err);
/** Frees a queue. Tickets that have not begun are given up; one that has is waited for.
 * Then nothing is touched any more. Nobody else may use it meanwhile.
 * @param queue what is freed, and becomes NULL; *queue may be NULL */
KVD_API void kvd_queue_free(kvd_queue **queue);

#endif

// What every folder uses: status codes with a message, cleanup attributes and small arithmetic
// helpers.
#ifndef KVD_PROTO_BASE_H
#define KVD_PROTO_BASE_H

#include "proto/kvd_limits.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// 0 is success; positive codes are the caller's to handle; a negative code is an errno that nobody
// expected and is forwarded up. daemon/rpc/status.c is the one place that maps these to gRPC codes.
enum kvd_status {
    KVD_OK = 0,
    KVD_E_INVALID,      // malformed or out of range
    KVD_E_NOT_FOUND,    // unknown, freed or foreign
    KVD_E_EXISTS,       // name taken
    KVD_E_PRECONDITION, // valid, but not in this state
    KVD_E_QUOTA,        // namespace quota
    KVD_E_FULL,         // pool or table is full
    KVD_E_LIMIT,        // a fixed limit of the daemon
    KVD_E_DENIED,       // not allowed
    KVD_E_UNAUTH,       // session unknown or expired
    KVD_E_UNAVAILABLE,  // try again later
    KVD_E_CORRUPT,      // data failed verification
    KVD_E_UNSUPPORTED,
    KVD_E_TIMEOUT,
    KVD_E_LOST, // the peer went away and took state with it
    KVD_E_INTERNAL,
};

struct kvd_error {
    int code;
    char text[512];
};

// Fills *e (NULL is allowed) and returns `code`, so that a failing function can `return
// kvd_fail(...)`.
__attribute__((format(printf, 3, 4))) int kvd_fail(struct kvd_error *e, int code, const char *fmt,
                                                   ...);

// Puts "prefix: " before the text that *e already has. Returns e->code.
__attribute__((format(printf, 2, 3))) int kvd_fail_in(struct kvd_error *e, const char *fmt, ...);

const char *kvd_status_name(int code);

// What programs tell as their version: KVD_VERSION, and in a checkout the commit (version.sh).
const char *kvd_build_version(void);

// Names of codecs as planes have them: "bf16", "int2", "int2c", "int2-lm", "turboquant-2" ...
// "unknown" for a number that is none, and KVD_CODEC_COUNT for a name that is none.
const char *kvd_codec_name(uint32_t codec);
uint32_t kvd_codec_find(const char *name);
// All of them for error messages: "bf16, int2, ...".
const char *kvd_codec_names(void);
// The codecs of K and V as texts: a codec's name for both, "k=NAME,v=NAME" where they differ.
enum { KVD_CODECS_TEXT = 48 };
// Writes the text and returns it.
const char *kvd_codecs_name(struct kvd_codecs c, char text[KVD_CODECS_TEXT]);
// Reads one, K and V in any order. False: it is none.
bool kvd_codecs_find(const char *text, struct kvd_codecs *out);
// The built-in rotation set of sessions that name none; "" for a codec without rotations.
const char *kvd_codec_transform(uint32_t codec);

// `len` bytes of `in` as 2*len lower-case hex digits and a NUL.
void kvd_hex(const void *in, size_t len, char *out);

// Parses "64MiB", "1.5GiB", "4096"; suffixes KiB MiB GiB TiB (and K M G T). KVD_E_INVALID when
// malformed or too large.
int kvd_parse_size(const char *text, uint64_t *out);

// A size for people: "1.5 GiB". Writes at most `cap` bytes.
const char *kvd_format_size(uint64_t bytes, char *out, size_t cap);

// True for 1..max bytes of printable ASCII without spaces.
bool kvd_name_valid(const char *name, size_t max);

static inline void kvd_cleanup_free(void *p)
{
    void **pp = (void **)p;
    free(*pp);
    *pp = NULL;
}
static inline void kvd_cleanup_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}
static inline void kvd_cleanup_file(FILE **f)
{
    if (*f)
        fclose(*f);
    *f = NULL;
}

#define KVD_AUTO(fn) __attribute__((cleanup(fn)))
#define KVD_FREE     KVD_AUTO(kvd_cleanup_free)
#define KVD_CLOSE    KVD_AUTO(kvd_cleanup_close)
#define KVD_FCLOSE   KVD_AUTO(kvd_cleanup_file)

// Hands a pointer out of a cleanup variable: yields it and leaves NULL behind.
#define KVD_TAKE(p)                                                                                \
    ({                                                                                             \
        __typeof__(p) kvd_taken_ = (p);                                                            \
        (p) = NULL;                                                                                \
        kvd_taken_;                                                                                \
    })

// The same for a file descriptor in a KVD_CLOSE variable.
#define KVD_TAKE_FD(fd)                                                                            \
    ({                                                                                             \
        int kvd_taken_fd_ = (fd);                                                                  \
        (fd) = -1;                                                                                 \
        kvd_taken_fd_;                                                                             \
    })

#define KVD_LEN(a)    (sizeof(a) / sizeof((a)[0]))
#define KVD_MIN(a, b) ((a) < (b) ? (a) : (b))
#define KVD_MAX(a, b) ((a) > (b) ? (a) : (b))

static inline uint64_t kvd_div_up(uint64_t a, uint64_t b)
{
    return (a + b - 1) / b;
}
static inline uint64_t kvd_round_up(uint64_t a, uint64_t b)
{
    return kvd_div_up(a, b) * b;
}

#endif

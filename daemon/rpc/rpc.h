// gRPC: the server, its calls, and how handlers answer them. Loop thread, but for the
// completion-queue thread inside.
//
// Life of a unary call:
//   1. a request tag fires with the payload       (accepted; another request is armed in its place)
//   2. the handler runs; it answers now, or keeps the call and answers later. A call that is kept
//   is watched: on_cancelled tells that its client cancelled it, its deadline passed or its
//   connection is gone
//   3. kvd_call_reply or kvd_call_fail, once for each call, cancelled or not, starts the batch that
//   answers: initial metadata, message, status, and receive-close if it was not watched before
//   4. the tags fire: free
// A streaming call starts with initial metadata and receive-close; kvd_call_send adds messages; it
// ends when the client goes or kvd_call_finish is called.
#ifndef KVD_DAEMON_RPC_H
#define KVD_DAEMON_RPC_H

#include <grpc/grpc.h>
#include <protobuf-c/protobuf-c.h>
#include <stdatomic.h>

#include "daemon/core/part.h"

// What gRPC is given to name an operation, and gives back when it is done.
struct kvd_tag {
    void (*fire)(struct kvd_tag *tag, bool ok);
    _Atomic bool armed; // orders the loop's writes before the queue thread's; gRPC does too, but
                        // tools cannot see it
    bool ok;
    struct kvd_tag *previous, *next; // among those that have fired
};

struct kvd_method {
    const char *path; // "/kvd.v1.KvCache/Append"
    const ProtobufCMessageDescriptor *request;
    void (*handle)(struct kvd_call *call, const void *request);
    bool streaming;
    bool (*only)(const struct kvd_call *call); // who may call; NULL: whoever can connect
    bool while_draining;                       // answered also when the daemon drains
};

enum {
    KVD_STREAM_SLOTS = 256,       // messages that wait for a slow reader of a stream
    KVD_HELLO_TIMEOUT_MS = 10000, // a connection must have said something by then
};

struct kvd_link; // links.h
struct kvd_out;  // a message waiting on a stream

struct kvd_call {
    struct kvd_daemon *d;
    const struct kvd_method *method;
    uint32_t method_index;
    grpc_call *call;
    grpc_byte_buffer *payload;
    grpc_metadata_array metadata;
    gpr_timespec deadline;
    uint64_t accepted_ns;
    struct kvd_link *link; // by which it came; NULL: it has not been charged yet
    bool counted;          // by the link
    bool unsettled;        // the next turn waits for it
    struct kvd_user *user; // who is charged; NULL: not charged
    uint64_t reply_bytes;  // taken of the reply share
    uint64_t sending_ms;   // since when there is something to send; 0: nothing
    struct kvd_call *previous_unread, *next_unread;
    struct kvd_tag request_tag, done_tag, close_tag, send_tag;
    ProtobufCMessage *request;
    size_t request_bytes;
    grpc_byte_buffer *reply;
    grpc_slice message; // status text
    grpc_status_code code;
    int cancelled;
    // Nobody waits for the answer any more: called at most once, on the loop thread, after the
    // handler has returned and before the call is answered, which it may do. The answer is dropped.
    void (*on_cancelled)(struct kvd_call *call);
    bool handling, answered, watched, done;
    // Streams
    struct kvd_out *out; // that are to be sent
    uint32_t out_count;
    bool sending, closed, finishing, finished;
    struct kvd_call *next_watch;
    void (*on_closed)(struct kvd_call *call);
    void (*on_room)(struct kvd_call *call); // a message was sent
    // A call that is being worked on elsewhere
    void *work;
};

// The server. Starting it fails with KVD_E_LOST when its thread could not be started: gRPC may not
// have got its own then, in which case it hangs when it is shut down.
extern const struct kvd_part kvd_part_rpc;

// Answers a call. The call must not be touched afterwards.
void kvd_call_reply(struct kvd_call *call, const void *reply);
// The same with a message that is already packed.
void kvd_call_reply_packed(struct kvd_call *call, const uint8_t *data, size_t len);
__attribute__((format(printf, 3, 4))) void kvd_call_fail(struct kvd_call *call, int code,
                                                         const char *fmt, ...);
void kvd_call_fail_error(struct kvd_call *call, const struct kvd_error *err);
// Takes room for a reply of n bytes more, before memory is taken for it. KVD_E_LIMIT: the client,
// its user or all together have too many replies that are being made or wait to be read.
int kvd_call_reserve(struct kvd_call *call, size_t n, struct kvd_error *err);
bool kvd_call_expired(const struct kvd_call *call);

// Streams: sends a message. False: KVD_STREAM_SLOTS wait already, or the client has too much that
// it does not read; it is not sent.
bool kvd_call_send(struct kvd_call *call, const void *message);
bool kvd_call_send_packed(struct kvd_call *call, const uint8_t *data, size_t len);
void kvd_call_finish(struct kvd_call *call, int code, const char *text);

// The value of a metadata key as text, "" if absent. Writes at most cap bytes.
void kvd_call_metadata(const struct kvd_call *call, const char *key, char *out, size_t cap);
// True if the name of the peer's certificate is in the list.
bool kvd_call_peer_named(const struct kvd_call *call, const struct kvd_allow *allow);

#define KVD_HANDLER(name) void kvd_on_##name(struct kvd_call *call, const void *request)

grpc_status_code kvd_status_to_grpc(int code);
const char *kvd_grpc_code_name(int code);

#endif

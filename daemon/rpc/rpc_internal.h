// What the files of the gRPC server share.
#ifndef KVD_DAEMON_RPC_INTERNAL_H
#define KVD_DAEMON_RPC_INTERNAL_H

#include "daemon/rpc/rpc.h"

struct kvd_out {
    struct kvd_out *previous, *next;
    grpc_byte_buffer *bytes;
};

struct kvd_rpc {
    grpc_server *server;
    grpc_completion_queue *cq;
    void *registered[KVD_MAX_METHODS];
    uint32_t unarmed[KVD_MAX_METHODS]; // requests for which there was no memory
    uv_thread_t thread;
    bool thread_running;
    uv_mutex_t lock;
    uv_async_t async;
    uv_timer_t timer; // looks for answers that nobody reads
    uint32_t handles;
    struct kvd_tag *fired;   // to be handled by the loop
    uv_idle_t idle;          // runs while there are:
    struct kvd_tag *later;   // calls that nobody waits for any more
    bool drained;            // the queue has shut down
    struct kvd_call *unread; // whose answers or messages have not all been read, oldest first
    bool stopping;
    struct kvd_tag shutdown_tag;
    bool shut;                // the loop knows that
    struct kvd_call *unknown; // the armed request for methods that we do not have
    grpc_call_details unknown_details;
};

// Names what a tag does when it fires. To be called before it goes to gRPC, after all else is
// written.
static inline void kvd_tag_arm(struct kvd_tag *tag, void (*fire)(struct kvd_tag *tag, bool ok))
{
    tag->fire = fire;
    atomic_store_explicit(&tag->armed, true, memory_order_release);
}

// -- later.c ------------------------------------------------------------------------------------
void kvd_later_init(struct kvd_daemon *d);
// Has a tag that gRPC does not have fire again, some of them in each round of the loop, when what
// somebody waits for has been handled.
void kvd_tag_later(struct kvd_daemon *d, struct kvd_tag *tag, void (*fire)(struct kvd_tag *, bool));
// All of them now: to be called when gRPC has nothing more to say.
void kvd_later_all(struct kvd_daemon *d);

// -- packing.c ----------------------------------------------------------------------------------
// NULL: not such a message, one that unpacks to much more than its size, or one with a string that
// is no text (control characters, NUL above all, and invalid UTF-8); *err says which. The caller
// frees it.
ProtobufCMessage *kvd_message_unpack(const ProtobufCMessageDescriptor *type,
                                     grpc_byte_buffer *payload, struct kvd_error *err);
// Looks whether repeated fields have too many items. KVD_E_INVALID says which. limits.c
int kvd_request_check(const ProtobufCMessage *m, struct kvd_error *err);
grpc_byte_buffer *kvd_message_pack(const ProtobufCMessage *m);
// A buffer of one slice, whose reference is taken.
grpc_byte_buffer *kvd_message_wrap(grpc_slice slice);

// -- call.c -------------------------------------------------------------------------------------
void kvd_call_free(struct kvd_call *c);
// Has its link and its user charged for it. KVD_E_LIMIT: one of them has too many.
int kvd_call_charge(struct kvd_call *c, struct kvd_error *err);
// The loop is done with a call for now.
void kvd_call_settle(struct kvd_call *c);
// Gives up answers that nobody has read for too long.
void kvd_calls_give_up_unread(struct kvd_daemon *d);
// Notes that gRPC has something of the call to send, or that it is sent.
void kvd_call_sending(struct kvd_call *c);
void kvd_call_sent(struct kvd_call *c);
// Gives back a part of what kvd_call_reserve took.
void kvd_call_unreserve(struct kvd_call *c, size_t n);
// Counts the call in the metrics, with its code.
void kvd_call_account(struct kvd_call *c);
void kvd_call_set_message(struct kvd_call *c, int code, const char *text);
// Puts the operation that sends the call's status into *op; returns the next.
grpc_op *kvd_call_status_op(struct kvd_call *c, grpc_op *op);

// -- answer.c -----------------------------------------------------------------------------------
// A call that is not answered at once is told when its client goes away.
void kvd_call_watch(struct kvd_call *c);
// A call lives as long as gRPC has a tag of it, or its handler has not returned.
void kvd_call_maybe_free(struct kvd_call *c);

// -- accept.c -----------------------------------------------------------------------------------
// Arms a request for a method, and for methods that we do not have.
void kvd_call_arm(struct kvd_daemon *d, uint32_t index);
void kvd_call_arm_unknown(struct kvd_daemon *d);
// Arms what could not be when memory was short.
void kvd_calls_arm_again(struct kvd_daemon *d);

// -- streams.c ----------------------------------------------------------------------------------
void kvd_stream_begin(struct kvd_call *c);

#endif

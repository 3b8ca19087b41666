// A gRPC channel to a daemon and blocking calls over it. Thread-safe.
#ifndef KVD_CLIENT_CHANNEL_H
#define KVD_CLIENT_CHANNEL_H

#include <protobuf-c/protobuf-c.h>

#include "proto/base.h"

struct kvd_channel;

struct kvd_channel_options {
    const char *address;                     // "unix:/path" or "host:port"
    const char *tls_ca, *tls_cert, *tls_key; // PEM files, for TCP; NULL: no TLS
    const char *tls_server_name;             // what the certificate must name; NULL: the host
};

// Refuses options of TLS that do not go together, or not with the address.
int kvd_channel_check(const struct kvd_channel_options *options, struct kvd_error *err);
struct kvd_channel *kvd_channel_new(const struct kvd_channel_options *options,
                                    struct kvd_error *err);
void kvd_channel_free(struct kvd_channel **channel);

// Metadata "kvd-ticket" of every call from now on. NULL: none.
void kvd_channel_set_ticket(struct kvd_channel *channel, const char *ticket);

// One unary call. *reply is to be freed with protobuf_c_message_free_unpacked. Codes are kvd's;
// KVD_E_UNAVAILABLE when there is no daemon.
int kvd_channel_call(struct kvd_channel *channel, const char *method, const void *request,
                     const ProtobufCMessageDescriptor *reply_type, uint32_t timeout_ms, void *reply,
                     struct kvd_error *err);
// Whether the other side is there: a call that failed all the same was answered by it.
bool kvd_channel_connected(struct kvd_channel *channel);

// A server stream. Opening waits for nothing: what is wrong shows with the first message.
struct kvd_stream;
struct kvd_stream *kvd_stream_open(struct kvd_channel *channel, const char *method,
                                   const void *request, struct kvd_error *err);
// The next message, or KVD_E_TIMEOUT, or KVD_E_LOST when the stream ended (err says why).
int kvd_stream_next(struct kvd_stream *stream, const ProtobufCMessageDescriptor *type,
                    uint32_t timeout_ms, void *out, struct kvd_error *err);
void kvd_stream_free(struct kvd_stream **stream);

// Who may not use a socket is told so; of its path.
#define KVD_SOCKET_DENIED                                                                          \
    "%s: you may not use it: join the socket's group (kvd, or socket-group of kvd.conf), or see "  \
    "socket-mode"

// Connects to the fd socket beside a "unix:" address and reads the hello, in so many milliseconds
// at most. The ticket gets 33 bytes. Returns the socket, or a negative status.
int kvd_fdsock_connect(const char *address, uint32_t timeout_ms, char *ticket,
                       struct kvd_error *err);
// Sends a memfd under a key.
int kvd_fdsock_send(int sock, uint64_t key, int fd, uint32_t timeout_ms, struct kvd_error *err);

#endif

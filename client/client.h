// Inside libkvd: a client, its session, and calls that survive a daemon's restart.
#ifndef KVD_CLIENT_CLIENT_H
#define KVD_CLIENT_CLIENT_H

#include <pthread.h>
#include <stdatomic.h>

#include "client/channel.h"
#include "kvd.pb-c.h"
#include "kvd/kvd.h"

struct kvd_buffer {
    kvd_client *client;
    kvd_buffer *next;
    uint64_t key;
    _Atomic uint64_t
        id; // changes when another thread reconnects; ids of an old session name nothing
    Kvd__V1__RegisterBufferRequest__Memory kind;
    int fd;          // of a memfd or a CUDA_FD; -1
    uint8_t ipc[64]; // of CUDA_IPC
    void *data;      // of a memfd, mapped; on a GPU as the caller said
    uint64_t at;     // where data begins in what is registered
    uint64_t size;   // from there
};

struct kvd_client {
    char *address, *namespace_name, *client_name, *codec, *rotation_set;
    uint32_t *layers;
    Kvd__V1__Geometry geometry; // refers to the copies above
    Kvd__V1__Windows windows;
    uint32_t timeout_ms;
    struct kvd_channel *channel;
    // Guards what a reconnect replaces. Calls hold it for reading.
    pthread_rwlock_t lock;
    uint64_t epoch; // counts sessions
    int sock;       // fd socket; -1 over TCP
    char session[33], instance[33];
    Kvd__V1__OpenSessionReply *opened;
    kvd_buffer *buffers;
    _Atomic uint64_t next_request, next_key;
    struct kvd_stream *events;
    uint64_t events_epoch;
    kvd_direct *direct;
};

// A call within the session: `set_session` points to the request's session field. On a lost session
// it reconnects and returns KVD_ERR_LOST.
kvd_result kvd_client_call(kvd_client *c, const char *method, void *request, char **set_session,
                           const ProtobufCMessageDescriptor *reply_type, void *reply,
                           kvd_failure *err);

// Registers a buffer that has its memory and links it to the client. On failure *b is not freed.
kvd_result kvd_client_add_buffer(kvd_client *c, kvd_buffer *b, kvd_failure *err);

kvd_result kvd_client_result(int code);
kvd_result kvd_client_fail(kvd_failure *err, const struct kvd_error *e);

#endif

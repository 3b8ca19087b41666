// kvctl: the operator's command line. One function per command; see kvctl(1) for exit codes.
#ifndef KVD_CLIENT_KVCTL_H
#define KVD_CLIENT_KVCTL_H

#include <jansson.h>

#include "admin.pb-c.h"
#include "client/channel.h"

enum exit_code {
    EXIT_OK = 0,
    EXIT_FAILED = 1,      // the daemon refused or the thing failed
    EXIT_USED_WRONG = 2,  // bad arguments
    EXIT_UNREACHABLE = 3, // no daemon there
    EXIT_DENIED = 4,      // not an operator
};

struct kvctl {
    const char *address;
    const char *tls_ca, *tls_cert, *tls_key;
    const char *store, *cache; // for calib commands that need no daemon
    const char *sign, *public_key;
    bool json;
    uint32_t timeout_ms;
    struct kvd_channel *channel; // made on first use
    int sock;                    // fd socket, when an operator's ticket was fetched
};

struct command {
    const char *name, *arguments, *help;
    int (*run)(struct kvctl *k, int argc, char **argv); // argv[0] is the command's name
};

int kvctl_fail(const struct kvd_error *err);
__attribute__((format(printf, 1, 2))) int kvctl_usage(const char *fmt, ...);

// One Admin call. Returns an exit code; on success *reply is to be freed by the caller.
int kvctl_call(struct kvctl *k, const char *method, const void *request,
               const ProtobufCMessageDescriptor *reply_type, void *reply);
// The same as an operator: fetches a ticket from the fd socket first.
int kvctl_operator_call(struct kvctl *k, const char *method, const void *request,
                        const ProtobufCMessageDescriptor *reply_type, void *reply);
struct kvd_channel *kvctl_channel(struct kvctl *k, struct kvd_error *err);

// -- output.c -----------------------------------------------------------------------------------
// Any message as JSON, all fields present, by reflection.
json_t *kvctl_to_json(const ProtobufCMessage *m);
// Prints a message as JSON and frees it.
int kvctl_print_json(ProtobufCMessage *m);

struct table;
// Column titles separated by '|'; a title that begins with '>' aligns right.
struct table *table_new(const char *titles);
__attribute__((format(printf, 2, 3))) void table_cell(struct table *t, const char *fmt, ...);
void table_size(struct table *t, uint64_t bytes);
void table_time(struct table *t, uint64_t ms);
// Prints and frees. `empty` is said when there are no rows.
void table_print(struct table *t, const char *empty);
const char *text_time(uint64_t ms, char *out, size_t cap);
// A bar on stderr, if that is a terminal.
void progress(const char *what, uint64_t have, uint64_t total);
void progress_end(void);

#define COMMAND(name) int cmd_##name(struct kvctl *k, int argc, char **argv)
COMMAND(status);
COMMAND(workers);
COMMAND(sequences);
COMMAND(pool);
COMMAND(metrics);
COMMAND(top);
COMMAND(ping);
COMMAND(quota);
COMMAND(evict);
COMMAND(drain);
COMMAND(log_level);
COMMAND(calib);
COMMAND(doctor);
COMMAND(version);

#endif

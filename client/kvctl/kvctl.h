// kvctl: the operator's command line. The table of commands says what each takes (commands.c); the
// parser checks it before anything is sent (parse.c); one function runs each. See kvctl(1) for exit
// codes.
#ifndef KVD_CLIENT_KVCTL_H
#define KVD_CLIENT_KVCTL_H

#include <jansson.h>

#include "admin.pb-c.h"
#include "client/lib/channel.h"

enum exit_code {
    EXIT_OK = 0,
    EXIT_FAILED = 1,      // the daemon refused or the thing failed
    EXIT_USED_WRONG = 2,  // bad arguments
    EXIT_UNREACHABLE = 3, // no daemon there
    EXIT_DENIED = 4,      // not an operator
};

// What an argument, or the value of an option, must be.
enum value {
    VALUE_NONE, // an option without a value
    VALUE_TEXT,
    VALUE_NAMESPACE,
    VALUE_NAME,     // of a published sequence
    VALUE_SIZE,     // "512MiB"
    VALUE_QUOTA,    // a size, or "none"
    VALUE_SECONDS,  // 0 to 3600
    VALUE_INTERVAL, // seconds, 0.1 to 3600
    VALUE_COUNT,    // 1 to 1000000
    VALUE_NUMBER,   // 0 to 1048576
    VALUE_LEVEL,    // of the log
    VALUE_TIER,     // host, directory or redis
    VALUE_SET,      // model@tag or a digest
    VALUE_SET_OR_FILE,
    VALUE_MODEL_TAG,
    VALUE_LAYERS, // "0-31" or "3,7,11"
    VALUE_HEAD_DIM,
    VALUE_SCALES, // of K and V, "unbiased,least-squares"
    VALUE_MATRIX, // a set that is built in
};

enum { MAX_ARGUMENTS = 17, MAX_OPTIONS = 20, MAX_SPECS = 4 };

struct argument_spec {
    const char *name;
    enum value value;
};

struct option_spec {
    const char *name;
    char letter;      // 0: none
    const char *word; // for its value in --help; NULL: it takes none
    enum value value;
    const char *help;
};

struct kvctl;

struct command {
    const char *name; // of one word or two
    const char *help; // one line
    const char *more; // for --help of the command; may be NULL
    struct argument_spec arguments[MAX_SPECS];
    unsigned required; // of them
    bool repeats;      // the last argument
    struct option_spec options[MAX_OPTIONS];
    bool everywhere;      // --all runs it for every instance
    const char *all_asks; // what is asked before it does; NULL: nothing
    bool takes_all;       // --all means something of its own
    bool operators;       // for operators only
    int (*run)(struct kvctl *k);
};

struct kvctl {
    const struct command *command;
    const char *arguments[MAX_ARGUMENTS + 1]; // checked
    unsigned n_arguments;
    const char
        *options[MAX_OPTIONS]; // of the command, by their place in its table; NULL: not given
    char **argv;               // the whole command line

    const char *address; // NULL until kvctl_find
    const char *instance;
    bool all;
    const char *tls_ca, *tls_cert, *tls_key;
    const char *store, *cache; // for calib commands that need no daemon
    const char *sign, *public_key;
    bool json;
    uint32_t timeout_ms;
    struct kvd_channel *channel; // made on first use
    int sock;                    // fd socket, when an operator's ticket was fetched
    json_t *collected;           // where --all gathers what would be printed; NULL: print it
};

// -- commands.c, calib_tool.c: each program has a table -------------------------------------------
// Command number `i`, or NULL after the last.
const struct command *kvctl_command(size_t i);
extern const struct command kvctl_fit, kvctl_eval; // calib_commands.c: both programs have them

// -- parse.c --------------------------------------------------------------------------------------
// Fills *k from the command line; does not return when that is wrong or asks for help.
void kvctl_parse(struct kvctl *k, int argc, char **argv);
// The value of an option of the command, "" if it takes none; NULL if it was not given.
const char *kvctl_option(const struct kvctl *k, const char *name);
// For what only the command itself can see to be wrong. Prints; returns EXIT_USED_WRONG.
__attribute__((format(printf, 1, 2))) int kvctl_usage(const char *fmt, ...);
// kvctl help.
int cmd_help(struct kvctl *k);

// -- main.c ---------------------------------------------------------------------------------------
int kvctl_fail(const struct kvd_error *err);
// Asks on the terminal. Off a terminal: says that it wants --yes. EXIT_OK if the answer is yes.
__attribute__((format(printf, 2, 3))) int kvctl_confirm(const struct kvctl *k, const char *fmt,
                                                        ...);

// One Admin call. Returns an exit code; on success *reply is to be freed by the caller.
int kvctl_call(struct kvctl *k, const char *method, const void *request,
               const ProtobufCMessageDescriptor *reply_type, void *reply);
// The same as an operator: fetches a ticket from the fd socket first.
int kvctl_operator_call(struct kvctl *k, const char *method, const void *request,
                        const ProtobufCMessageDescriptor *reply_type, void *reply);
// Finds the daemon, and shows it an operator's ticket in all calls from then on. An exit code.
int kvctl_as_operator(struct kvctl *k);
struct kvd_channel *kvctl_channel(struct kvctl *k, struct kvd_error *err);
// What that is made of, once the daemon is found.
struct kvd_channel_options kvctl_channel_options(const struct kvctl *k);
// Says in *err, which has what gRPC said, that the daemon cannot be reached, and why.
void kvctl_no_answer(const struct kvctl *k, struct kvd_error *err);
// Forgets the daemon that was spoken to.
void kvctl_hang_up(struct kvctl *k);

// -- instances.c ----------------------------------------------------------------------------------
// Finds the daemon that --address, --instance, $KVD_ADDRESS or else the runtime folder name, and
// fills in k->address. An exit code, with *err.
int kvctl_find(struct kvctl *k, struct kvd_error *err);
// Runs the command for every instance that there is, also where it failed for one. The worst of the
// exit codes.
int kvctl_everywhere(struct kvctl *k);

// -- output.c -----------------------------------------------------------------------------------
// Any message as JSON, as protobuf's own mapping has it: 64-bit integers are strings, fields keep
// the names of the .proto, and those with default values are there.
json_t *kvctl_to_json(const ProtobufCMessage *m);
// Prints a JSON value, or puts it into k->collected as "reply", and frees it. Returns EXIT_OK.
int kvctl_print(struct kvctl *k, json_t *j);
// The same for a message.
int kvctl_print_json(struct kvctl *k, ProtobufCMessage *m);
// Text that may be anything: what is no UTF-8 is replaced.
json_t *kvctl_text_json(const char *text);
// Text of files and of others for a terminal: control characters, and bytes that are no UTF-8, as
// \xNN; cut to what `out` holds, which is returned.
enum { KVCTL_TEXT = 1024 };
const char *kvctl_text(const char *text, char out[KVCTL_TEXT]);
// A 64-bit number as JSON has it here: a string.
json_t *kvctl_number_json(uint64_t n);

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

#define COMMAND(name) int cmd_##name(struct kvctl *k)
COMMAND(status);
COMMAND(workers);
COMMAND(sequences);
COMMAND(pool);
COMMAND(metrics);
COMMAND(top);
COMMAND(ping);
COMMAND(quota_ls);
COMMAND(quota_set);
COMMAND(evict);
COMMAND(tier_status);
COMMAND(tier_flush);
COMMAND(verify);
COMMAND(prefix_ls); // prefixes.c
COMMAND(prefix_show);
COMMAND(prefix_pin);
COMMAND(prefix_priority);
COMMAND(prefix_unpin);
COMMAND(prefix_drop);
COMMAND(why);
COMMAND(events); // events.c
COMMAND(drain);
COMMAND(reload);
COMMAND(log_level);
COMMAND(calib_ls);
COMMAND(calib_show);
COMMAND(calib_verify);
COMMAND(calib_fetch);
COMMAND(calib_import);
COMMAND(calib_hadamard);
COMMAND(calib_fit); // in kvctl, these two run kvctl-calib
COMMAND(calib_eval);
COMMAND(calib_publish);
COMMAND(calib_untag);
COMMAND(calib_pin);
COMMAND(calib_unpin);
COMMAND(calib_gc);
COMMAND(doctor);
COMMAND(bench);
COMMAND(version);

#endif

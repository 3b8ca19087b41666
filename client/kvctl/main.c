// What every command stands on: calls, errors, and the way from command line to exit code.
#include <errno.h>
#include <stdarg.h>

#include "client/kvctl/kvctl.h"

int kvctl_fail(const struct kvd_error *err)
{
    char text[KVCTL_TEXT];
    fprintf(stderr, "kvctl: %s\n", kvctl_text(err->text, text));
    return err->code == KVD_E_UNAVAILABLE ? EXIT_UNREACHABLE
           : err->code == KVD_E_DENIED    ? EXIT_DENIED
                                          : EXIT_FAILED;
}

int kvctl_confirm(const struct kvctl *k, const char *fmt, ...)
{
    char answer[16] = "";
    va_list ap;
    if (kvctl_option(k, "yes"))
        return EXIT_OK;
    if (!isatty(STDIN_FILENO))
        return kvctl_usage("there is no terminal to ask on; say --yes");
    va_start(ap, fmt);
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    fprintf(stderr, " [y/N] ");
    if (fgets(answer, sizeof(answer), stdin) && (*answer == 'y' || *answer == 'Y'))
        return EXIT_OK;
    fprintf(stderr, "kvctl: nothing was done\n");
    return EXIT_FAILED;
}

struct kvd_channel_options kvctl_channel_options(const struct kvctl *k)
{
    return (struct kvd_channel_options){
        .address = k->address, .tls_ca = k->tls_ca, .tls_cert = k->tls_cert, .tls_key = k->tls_key};
}

struct kvd_channel *kvctl_channel(struct kvctl *k, struct kvd_error *err)
{
    if (!k->channel && kvctl_find(k, err) == EXIT_OK) {
        const struct kvd_channel_options o = kvctl_channel_options(k);
        k->channel = kvd_channel_new(&o, err);
    }
    return k->channel;
}

void kvctl_no_answer(const struct kvctl *k, struct kvd_error *err)
{
    bool path = strncmp(k->address, "unix:", 5) == 0;
    if (path && access(k->address + 5, W_OK) && errno == EACCES)
        kvd_fail(err, KVD_E_DENIED, KVD_SOCKET_DENIED, k->address + 5);
    else
        kvd_fail_in(
            err, "no answer from %s (is kvd running there? --address says where to look%s)",
            k->address,
            path || k->tls_ca ? "" : "; if it speaks TLS, say --tls-ca, --tls-cert and --tls-key");
}

void kvctl_hang_up(struct kvctl *k)
{
    kvd_channel_free(&k->channel);
    if (k->sock >= 0)
        close(k->sock);
    k->sock = -1;
    k->address = NULL;
}

// Finds the daemon, or says why there is none.
static int find(struct kvctl *k)
{
    struct kvd_error err = {0};
    int code = kvctl_find(k, &err);
    if (code)
        kvctl_fail(&err);
    return code;
}

int kvctl_call(struct kvctl *k, const char *method, const void *request,
               const ProtobufCMessageDescriptor *reply_type, void *reply)
{
    struct kvd_error err = {0};
    char path[128];
    snprintf(path, sizeof(path), "/kvd.v1.Admin/%s", method);
    int code = find(k);
    if (code)
        return code;
    struct kvd_channel *c = kvctl_channel(k, &err);
    if (!c || kvd_channel_call(c, path, request, reply_type, k->timeout_ms, reply, &err)) {
        // A kvd that is there may be without its store, or draining.
        if (err.code == KVD_E_UNAVAILABLE && c && kvd_channel_connected(c)) {
            kvctl_fail(&err);
            return EXIT_FAILED;
        }
        if (err.code == KVD_E_UNAVAILABLE)
            kvctl_no_answer(k, &err);
        return kvctl_fail(&err);
    }
    return EXIT_OK;
}

int kvctl_as_operator(struct kvctl *k)
{
    struct kvd_error err = {0};
    char ticket[33];
    int code = find(k);
    if (code)
        return code;
    if (k->sock < 0 && strncmp(k->address, "unix:", 5) == 0) {
        k->sock = kvd_fdsock_connect(k->address, k->timeout_ms, ticket, &err);
        if (k->sock < 0)
            return kvctl_fail(&err);
        if (!kvctl_channel(k, &err))
            return kvctl_fail(&err);
        kvd_channel_set_ticket(k->channel, ticket);
    }
    return EXIT_OK;
}

int kvctl_operator_call(struct kvctl *k, const char *method, const void *request,
                        const ProtobufCMessageDescriptor *reply_type, void *reply)
{
    int code = kvctl_as_operator(k);
    return code ? code : kvctl_call(k, method, request, reply_type, reply);
}

int main(int argc, char **argv)
{
    struct kvctl k = {.argv = argv, .timeout_ms = 10000, .sock = -1};
    kvctl_parse(&k, argc, argv);
    int code = k.all && k.command->everywhere ? kvctl_everywhere(&k) : k.command->run(&k);
    kvctl_hang_up(&k);
    return code;
}

// The command line: words of the table of commands, options of argp. Everything is checked here, so
// that nothing is sent, and nothing stopped or evicted, by a command that was not understood.
//
// kvctl [option...] COMMAND [option...] [VERB [option...]] [argument or option...]
#include <argp.h>
#include <math.h>
#include <stdarg.h>

#include "calib/store.h"
#include "client/kvctl/kvctl.h"
#include "proto/kvd_limits.h"

static const struct command *understood; // the command, once it is known

int kvctl_usage(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "kvctl: ");
    vfprintf(stderr, fmt, ap);
    fprintf(stderr, "; see kvctl%s%s --help\n", understood ? " " : "",
            understood ? understood->name : "");
    va_end(ap);
    return EXIT_USED_WRONG;
}

// -- options of all commands ----------------------------------------------------------------------

enum {
    OPT_TLS_CA = 1000,
    OPT_TLS_CERT,
    OPT_TLS_KEY,
    OPT_STORE,
    OPT_CACHE,
    OPT_SIGN,
    OPT_PUBLIC_KEY,
    OPT_USAGE,
    OPT_ALL,
    OPT_OWN = 2000, // of the command: its place in the table
};

static const struct argp_option common_options[] = {
    {"address", 'a', "ADDRESS", 0,
     "unix:PATH or HOST:PORT (default: $KVD_ADDRESS, or the one socket under /run/kvd)", 0},
    {"instance", 'i', "NAME", 0, "unix:/run/kvd/NAME/kvd.sock, where kvd@NAME listens", 0},
    {"all", OPT_ALL, 0, 0,
     "Of commands that take it, see kvctl(1): every instance, one after the other", 0},
    {"json", 'j', 0, 0, "Print JSON, for scripts", 0},
    {"timeout", 't', "SECONDS", 0, "Give up after this long (default: 10)", 0},
    {"tls-ca", OPT_TLS_CA, "FILE", 0, "Certificate authority of the server: use TLS", 1},
    {"tls-cert", OPT_TLS_CERT, "FILE", 0, "Client certificate, for mTLS", 1},
    {"tls-key", OPT_TLS_KEY, "FILE", 0, "Its key", 1},
    {"store", OPT_STORE, "URL", 0, "calib: use this store, without a daemon", 2},
    {"cache", OPT_CACHE, "DIR", 0, "calib: use this cache, without a daemon", 2},
    {"sign", OPT_SIGN, "FILE", 0, "calib: sign what is published with this Ed25519 private key", 2},
    {"public-key", OPT_PUBLIC_KEY, "FILE", 0, "calib: take only sets signed with this key", 2},
    {"help", 'h', 0, 0, "Show this help", -1},
    {"usage", OPT_USAGE, 0, 0, "Show the options in short", -1},
    {"version", 'V', 0, 0, "Show kvctl's version", -1},
    {0},
};

// A decimal number and nothing else.
static bool parse_number(const char *text, double least, double most, double *out)
{
    size_t n = strspn(text, "0123456789.");
    char *end;
    *out = n && !text[n] ? strtod(text, &end) : -1;
    return n && !text[n] && !*end && *out >= least && *out <= most;
}

static bool instance_valid(const char *name)
{
    return *name && *name != '.' && !strchr(name, '/') && strlen(name) <= 64;
}

static error_t parse_common(int key, char *arg, struct argp_state *state)
{
    struct kvctl *k = state->input;
    double s;
    switch (key) {
    case 'a':
        k->address = arg;
        break;
    case 'i':
        if (!instance_valid(arg))
            argp_error(state, "--instance '%s': it wants the name of a folder in /run/kvd", arg);
        k->instance = arg;
        break;
    case OPT_ALL:
        k->all = true;
        break;
    case 'j':
        k->json = true;
        break;
    case 't':
        if (!parse_number(arg, 0.001, 1e6, &s))
            argp_error(state, "--timeout '%s': it wants seconds from 0.001 to 1000000", arg);
        k->timeout_ms = (uint32_t)(s * 1000);
        break;
    case 'h':
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        break;
    case OPT_USAGE:
        argp_state_help(state, stdout, ARGP_HELP_USAGE | ARGP_HELP_EXIT_OK);
        break;
    case 'V':
        printf("kvctl %s\n", kvd_build_version());
        exit(EXIT_OK);
    case OPT_TLS_CA:
        k->tls_ca = arg;
        break;
    case OPT_TLS_CERT:
        k->tls_cert = arg;
        break;
    case OPT_TLS_KEY:
        k->tls_key = arg;
        break;
    case OPT_STORE:
        k->store = arg;
        break;
    case OPT_CACHE:
        k->cache = arg;
        break;
    case OPT_SIGN:
        k->sign = arg;
        break;
    case OPT_PUBLIC_KEY:
        k->public_key = arg;
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static const struct argp common = {.options = common_options, .parser = parse_common};
static const struct argp_child children[] = {{&common, 0, "Options of all commands:", 1}, {0}};

// -- values ---------------------------------------------------------------------------------------

// What a value of this kind wants, if `text` is not that; else NULL.
static const char *wants(enum value kind, const char *text)
{
    uint64_t size;
    uint16_t layers[KVD_MAX_LAYERS];
    double n;
    enum kvd_scale scale;
    bool at = strchr(text, '@') != NULL;
    switch (kind) {
    case VALUE_NONE:
        return NULL;
    case VALUE_TEXT:
        return *text ? NULL : "something";
    case VALUE_NAMESPACE:
        return kvd_name_valid(text, KVD_MAX_NAMESPACE)
                   ? NULL
                   : "1 to 64 printable characters without spaces";
    case VALUE_NAME:
        return kvd_name_valid(text, KVD_MAX_NAME) ? NULL
                                                  : "1 to 128 printable characters without spaces";
    case VALUE_SIZE:
        return !kvd_parse_size(text, &size) && size ? NULL : "a size such as 512MiB or 8GiB";
    case VALUE_QUOTA:
        return strcmp(text, "none") == 0 || (!kvd_parse_size(text, &size) && size)
                   ? NULL
                   : "a size such as 512MiB or 8GiB, or none";
    case VALUE_SECONDS:
        return parse_number(text, 0, 3600, &n) ? NULL : "seconds from 0 to 3600";
    case VALUE_INTERVAL:
        return parse_number(text, 0.1, 3600, &n) ? NULL : "seconds from 0.1 to 3600";
    case VALUE_COUNT:
        return parse_number(text, 1, 1e6, &n) && n == floor(n) ? NULL
                                                               : "a number from 1 to 1000000";
    case VALUE_NUMBER:
        return parse_number(text, 0, 1 << 20, &n) && n == floor(n) ? NULL
                                                                   : "a number from 0 to 1048576";
    case VALUE_LEVEL:
        return strcmp(text, "error") == 0 || strcmp(text, "warning") == 0 ||
                       strcmp(text, "notice") == 0 || strcmp(text, "info") == 0 ||
                       strcmp(text, "debug") == 0
                   ? NULL
                   : "error, warning, notice, info or debug";
    case VALUE_TIER:
        return strcmp(text, "host") == 0 || strcmp(text, "directory") == 0 ||
                       strcmp(text, "redis") == 0
                   ? NULL
                   : "host, directory or redis";
    case VALUE_SET:
        return kvd_store_ref_valid(text) ? NULL : "model@tag or sha256:<64 hex>";
    case VALUE_SET_OR_FILE:
        return kvd_store_ref_valid(text) || access(text, F_OK) == 0 || strchr(text, '/')
                   ? NULL
                   : "a file, model@tag or sha256:<64 hex>";
    case VALUE_MODEL_TAG:
        return at && kvd_store_ref_valid(text) ? NULL : "model@tag";
    case VALUE_LAYERS:
        return kvd_layers_parse(text, layers) ? NULL
                                              : "ascending layer ids, such as 0-31 or 3,7,11";
    case VALUE_HEAD_DIM:
        return strspn(text, "0123456789") == strlen(text) && strlen(text) < 10 &&
                       kvd_head_dim_ok((uint32_t)strtoul(text, NULL, 10))
                   ? NULL
                   : "one of " KVD_HEAD_DIM_NAMES;
    case VALUE_SCALES:
        return kvd_scales_parse(text, &scale, &scale)
                   ? NULL
                   : "scales of K and V, separated by a comma, each " KVD_SCALE_NAMES;
    case VALUE_MATRIX:
        return kvd_rotset_built_in(text) ? NULL : "hadamard, random or identity";
    }
    return NULL;
}

static void check(struct argp_state *state, const char *what, enum value kind, const char *text)
{
    const char *want = wants(kind, text);
    if (want)
        argp_error(state, "%s: '%s' is not possible; it wants %s", what, text, want);
}

// -- one command ----------------------------------------------------------------------------------

static unsigned n_specs(const struct command *c)
{
    unsigned n = 0;
    while (n < MAX_SPECS && c->arguments[n].name)
        n++;
    return n;
}

static error_t parse_command(int key, char *arg, struct argp_state *state)
{
    struct kvctl *k = state->input;
    const struct command *c = k->command;
    unsigned n = n_specs(c);
    if (key == ARGP_KEY_INIT) {
        state->child_inputs[0] = k;
    } else if (key == ARGP_KEY_ARG) {
        if (k->n_arguments >= n && !(n && c->repeats))
            argp_error(state, n ? "'%s' is too much" : "'%s' is too much: it takes no arguments",
                       arg);
        if (k->n_arguments == MAX_ARGUMENTS)
            argp_error(state, "at most %d arguments are possible", MAX_ARGUMENTS);
        const struct argument_spec *a = &c->arguments[KVD_MIN(k->n_arguments, n - 1)];
        check(state, a->name, a->value, arg);
        k->arguments[k->n_arguments++] = arg;
    } else if (key == ARGP_KEY_END) {
        if (k->n_arguments < c->required)
            argp_error(state, "%s is missing", c->arguments[k->n_arguments].name);
    } else {
        for (int i = 0; i < MAX_OPTIONS && c->options[i].name; i++) {
            const struct option_spec *o = &c->options[i];
            if (key != (o->letter ? o->letter : OPT_OWN + i))
                continue;
            if (arg)
                check(state, o->name, o->value, arg);
            k->options[i] = arg ? arg : "";
            return 0;
        }
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

const char *kvctl_option(const struct kvctl *k, const char *name)
{
    for (int i = 0; i < MAX_OPTIONS && k->command->options[i].name; i++)
        if (strcmp(k->command->options[i].name, name) == 0)
            return k->options[i];
    return NULL;
}

// "NAMESPACE SIZE|none", "[SECONDS [COUNT]]", "DUMP [SET...]"
static void arguments_text(const struct command *c, char *out, size_t cap)
{
    size_t at = 0, optional = 0;
    out[0] = '\0';
    for (unsigned i = 0, n = n_specs(c); i < n && at + 64 < cap; i++) {
        optional += i >= c->required;
        at += (size_t)snprintf(out + at, cap - at, "%s%s%s%s", i ? " " : "",
                               i >= c->required ? "[" : "", c->arguments[i].name,
                               c->repeats && i + 1 == n ? "..." : "");
    }
    for (; optional && at + 1 < cap; optional--)
        at += (size_t)snprintf(out + at, cap - at, "]");
}

// What argp wants to know of a command. It lives as long as the program.
static const struct argp *argp_of(const struct command *c)
{
    static struct argp_option options[MAX_OPTIONS + 1];
    static char arguments[128], doc[1024];
    static struct argp argp;
    memset(options, 0, sizeof(options));
    for (int i = 0; i < MAX_OPTIONS && c->options[i].name; i++) {
        const struct option_spec *o = &c->options[i];
        options[i] = (struct argp_option){.name = o->name,
                                          .key = o->letter ? o->letter : OPT_OWN + i,
                                          .arg = o->word,
                                          .doc = o->help};
    }
    arguments_text(c, arguments, sizeof(arguments));
    snprintf(doc, sizeof(doc), "%s.%s%s%s%s", c->help, c->more ? " " : "", c->more ? c->more : "",
             c->operators ? " For operators." : "", "\vSee kvctl(1).");
    argp = (struct argp){.options = options[0].name ? options : NULL,
                         .parser = parse_command,
                         .args_doc = arguments,
                         .doc = doc,
                         .children = children};
    return &argp;
}

// -- the words before a command's arguments -------------------------------------------------------

// A level of words: commands (group NULL), or the verbs of a group.
struct level {
    struct kvctl *k;
    const char *group;
    int first; // index of the word that was found; 0: none
};

// The rest of a command's name after its group, or NULL if it is not of the group. The group NULL
// has them all.
static const char *rest_of(const struct command *c, const char *group)
{
    size_t n = group ? strlen(group) : 0;
    if (!group)
        return c->name;
    return strncmp(c->name, group, n) == 0 && c->name[n] == ' ' ? c->name + n + 1 : NULL;
}

static bool is_group(const char *word)
{
    const struct command *c;
    for (size_t i = 0; (c = kvctl_command(i)); i++)
        if (rest_of(c, word))
            return true;
    return false;
}

static const struct command *find_command(const char *group, const char *word)
{
    const struct command *c;
    for (size_t i = 0; (c = kvctl_command(i)); i++) {
        const char *rest = rest_of(c, group);
        if (rest && strcmp(rest, word) == 0)
            return c;
    }
    return NULL;
}

static error_t parse_word(int key, char *arg, struct argp_state *state)
{
    struct level *l = state->input;
    (void)arg;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = l->k;
        return 0;
    case ARGP_KEY_ARG:
        l->first = state->next - 1;
        state->next = state->argc; // the rest belongs to that word
        return 0;
    case ARGP_KEY_NO_ARGS:
        if (!l->group) {
            argp_state_help(state, stderr, ARGP_HELP_STD_USAGE | ARGP_HELP_DOC);
            exit(EXIT_USED_WRONG);
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const char *listed_group; // for the text below, which argp gives no context

// One command's line in the list of commands. What is too long for the line goes on below its
// beginning: argp would break it at the terminal's edge.
static void help_lines(FILE *f, const char *text)
{
    enum { INDENT = 32, WIDTH = 78 - INDENT };
    while (strlen(text) > WIDTH) {
        int n = WIDTH;
        while (n > 1 && text[n] != ' ')
            n--;
        fprintf(f, "%.*s\n%*s", n, text, INDENT, "");
        text += n + 1;
    }
    fprintf(f, "%s\n", text);
}

// The list of commands goes into --help.
static char *help_text(int key, const char *text, void *input)
{
    const struct command *c;
    (void)input;
    if (key != ARGP_KEY_HELP_POST_DOC)
        return (char *)text;
    char *out = NULL;
    size_t size;
    FILE *f = open_memstream(&out, &size);
    if (!f)
        return NULL;
    fprintf(f, "Commands:\n");
    for (size_t i = 0; (c = kvctl_command(i)); i++) {
        char head[192], arguments[128];
        if (!rest_of(c, listed_group))
            continue;
        arguments_text(c, arguments, sizeof(arguments));
        snprintf(head, sizeof(head), "%s%s%s", c->name, *arguments ? " " : "", arguments);
        if (strlen(head) > 28)
            fprintf(f, "  %s\n  %-30s", head, "");
        else
            fprintf(f, "  %-30s", head);
        help_lines(f, c->help);
    }
    fprintf(f, "\nkvctl help COMMAND tells the options of one. Exit codes: 0 done, 1 refused or\n"
               "failed, 2 wrong usage, 3 no daemon there, 4 not allowed. See kvctl(1).");
    fclose(f);
    return out;
}

static const struct argp words = {.parser = parse_word,
                                  .args_doc = "COMMAND [ARGUMENT...]",
                                  .doc =
                                      "Shows and steers kvd, the shared KV-cache memory daemon.\v ",
                                  .children = children,
                                  .help_filter = help_text};

// Parses with argv[0] as the name that messages begin with.
static void run_argp(const struct argp *argp, char *name, int argc, char **argv, unsigned flags,
                     void *input)
{
    char *first = argv[0];
    argv[0] = name;
    argp_parse(argp, argc, argv, flags | ARGP_NO_HELP, NULL, input);
    argv[0] = first;
}

// How many letters have to be put in, left out or changed to make one word of the other; words of
// WORD letters and more are far from all others.
enum { WORD = 32, NEAR = 2 };

static unsigned distance(const char *a, const char *b)
{
    const size_t n = strlen(a), m = strlen(b);
    unsigned row[WORD];
    if (n >= WORD || m >= WORD)
        return WORD;
    for (unsigned j = 0; j <= m; j++)
        row[j] = j;
    for (unsigned i = 1; i <= n; i++) {
        unsigned corner = row[0];
        row[0] = i;
        for (unsigned j = 1; j <= m; j++) {
            unsigned best = corner + (a[i - 1] != b[j - 1]);
            corner = row[j];
            best = best < row[j] + 1 ? best : row[j] + 1;
            row[j] = best < row[j - 1] + 1 ? best : row[j - 1] + 1;
        }
    }
    return row[m];
}

static void not_found(const char *group, const char *word)
{
    const struct command *c;
    unsigned least = NEAR + 1;
    char whole[WORD * 2], near[WORD * 2] = "", name[WORD * 2];
    snprintf(whole, sizeof(whole), "%s%s%.*s", group ? group : "", group ? " " : "", WORD, word);
    for (size_t i = 0; (c = kvctl_command(i)); i++) {
        const int length = group ? (int)strlen(c->name) : (int)strcspn(c->name, " ");
        snprintf(name, sizeof(name), "%.*s", length, c->name);
        const unsigned d = distance(whole, name);
        if (d >= least)
            continue;
        least = d;
        memcpy(near, name, sizeof(near));
    }
    fprintf(stderr, "kvctl: there is no command '%s'%s%s%s; see kvctl --help\n", whole,
            *near ? ", perhaps '" : "", near, *near ? "'" : "");
    exit(EXIT_USED_WRONG);
}

void kvctl_parse(struct kvctl *k, int argc, char **argv)
{
    static char name[64];
    char ls[] = "ls", *none[] = {ls, NULL};
    struct level l = {.k = k};
    argp_err_exit_status = EXIT_USED_WRONG;
    snprintf(name, sizeof(name), "kvctl");
    run_argp(&words, name, argc, argv, ARGP_IN_ORDER, &l);
    const char *word = argv[l.first];
    argc -= l.first;
    argv += l.first;
    if (is_group(word)) {
        l = (struct level){.k = k, .group = word};
        listed_group = word;
        snprintf(name, sizeof(name), "kvctl %.20s", word);
        run_argp(&words, name, argc, argv, ARGP_IN_ORDER, &l);
        argc = l.first ? argc - l.first : 1;
        argv = l.first ? argv + l.first : none;
    }
    k->command = find_command(l.group, argv[0]);
    if (!k->command)
        not_found(l.group, argv[0]);
    understood = k->command;
    snprintf(name, sizeof(name), "kvctl %.40s", k->command->name);
    run_argp(argp_of(k->command), name, argc, argv, 0, k);
    if (k->all && !k->command->everywhere && !k->command->takes_all)
        exit(kvctl_usage("--all does not go with %s", k->command->name));
}

// -- help -----------------------------------------------------------------------------------------

static json_t *option_json(const char *name, int letter, const char *word, const char *help)
{
    char text[2] = {letter > ' ' && letter < 127 ? (char)letter : '\0', '\0'};
    return json_pack("{s:s, s:s, s:s?, s:s}", "name", name, "letter", text, "value", word, "help",
                     help);
}

static int help_json(struct kvctl *k)
{
    json_t *all = json_array(), *shared = json_array();
    const struct command *c;
    for (size_t i = 0; (c = kvctl_command(i)); i++) {
        json_t *options = json_array();
        char arguments[128];
        arguments_text(c, arguments, sizeof(arguments));
        for (int o = 0; o < MAX_OPTIONS && c->options[o].name; o++)
            json_array_append_new(options, option_json(c->options[o].name, c->options[o].letter,
                                                       c->options[o].word, c->options[o].help));
        json_array_append_new(all, json_pack("{s:s, s:s, s:i, s:s, s:b, s:o}", "command", c->name,
                                             "arguments", arguments, "required", (int)c->required,
                                             "help", c->help, "operators", (int)c->operators,
                                             "options", options));
    }
    for (const struct argp_option *o = common_options; o->name; o++)
        json_array_append_new(shared, option_json(o->name, o->key, o->arg, o->doc));
    return kvctl_print(k, json_pack("{s:o, s:o}", "commands", all, "options", shared));
}

int cmd_help(struct kvctl *k)
{
    static char name[64] = "kvctl";
    const char *group = k->n_arguments && is_group(k->arguments[0]) ? k->arguments[0] : NULL;
    if (k->json)
        return help_json(k);
    if (k->n_arguments == 0 || (group && k->n_arguments == 1)) {
        listed_group = group;
        argp_help(&words, stdout, ARGP_HELP_LONG | ARGP_HELP_DOC | ARGP_HELP_USAGE, name);
        return EXIT_OK;
    }
    const struct command *c = find_command(group, k->arguments[group != NULL]);
    if (!c || (!group && k->n_arguments > 1))
        not_found(k->n_arguments > 1 ? k->arguments[0] : NULL, k->arguments[k->n_arguments - 1]);
    else
        snprintf(name, sizeof(name), "kvctl %.40s", c->name);
    argp_help(argp_of(c), stdout, ARGP_HELP_STD_HELP & ~(unsigned)ARGP_HELP_EXIT_OK, name);
    return EXIT_OK;
}

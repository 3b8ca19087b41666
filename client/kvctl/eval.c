// kvctl calib eval.
#include <argp.h>

#include "client/kvctl/calib_tool.h"
#include "client/kvctl/evaluation.h"

enum { OPT_SINK = 1000, OPT_RECENT, OPT_CONTEXTS, OPT_HTML, OPT_CODECS };

static const struct argp_option options[] = {
    {"context", 'c', "TOKENS", 0, "Tokens attended at a time (default: 2048)", 0},
    {"queries", 'q', "N", 0, "Last positions of a context that ask (default: 64)", 0},
    {"contexts", OPT_CONTEXTS, "N", 0, "At most so many a layer (default: all)", 0},
    {"sink", OPT_SINK, "TOKENS", 0, "Kept in bf16 at the beginning (default: 64)", 0},
    {"recent", OPT_RECENT, "TOKENS", 0, "Kept in bf16 at the end (default: 256)", 0},
    {"codecs", OPT_CODECS, "LIST", 0, "Only these, separated by commas (default: all there are)",
     0},
    {"threads", 't', "N", 0, "Default: as many as there are cores", 0},
    {"html", OPT_HTML, "FILE", 0, "Also write a report, one file that needs no other", 0},
    {"json", 'j', 0, 0, "Print JSON", 0},
    {0},
};

struct arguments {
    struct kvd_eval_options o;
    const char *dump, *files[EVALUATION_FILES], *html;
    uint32_t n_files;
    bool json, codecs[KVD_CODEC_COUNT];
};

static void choose_codecs(struct arguments *a, const char *list, struct argp_state *state)
{
    char name[32];
    int n;
    memset(a->codecs, 0, sizeof(a->codecs));
    for (; sscanf(list, "%31[^,]%n", name, &n) == 1; list += n + (list[n] == ',')) {
        uint32_t codec = kvd_codec_find(name);
        if (codec == KVD_CODEC_COUNT)
            argp_error(state, "--codecs: there is no codec %s; known are " KVD_CODEC_NAMES, name);
        a->codecs[codec] = true;
    }
    if (*list)
        argp_error(state, "--codecs: it wants names, separated by commas: " KVD_CODEC_NAMES);
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct arguments *a = state->input;
    uint32_t *number = key == 'c'            ? &a->o.context
                       : key == 'q'          ? &a->o.queries
                       : key == OPT_CONTEXTS ? &a->o.max_contexts
                       : key == OPT_SINK     ? &a->o.sink
                       : key == OPT_RECENT   ? &a->o.recent
                       : key == 't'          ? &a->o.threads
                                             : NULL;
    int n = 0;
    if (number) {
        if (sscanf(arg, "%u%n", number, &n) != 1 || arg[n] || *number > 1u << 20)
            argp_error(state, "%s: it wants a number", arg);
        return 0;
    }
    switch (key) {
    case OPT_HTML:
        a->html = arg;
        break;
    case OPT_CODECS:
        choose_codecs(a, arg, state);
        break;
    case 'j':
        a->json = true;
        break;
    case ARGP_KEY_ARG:
        if (state->arg_num > EVALUATION_FILES)
            argp_error(state, "at most %d sets at a time", EVALUATION_FILES);
        if (state->arg_num == 0)
            a->dump = arg;
        else
            a->files[a->n_files++] = arg;
        break;
    case ARGP_KEY_END:
        if (!a->dump)
            argp_usage(state);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

// Adds a case of the last set, if its codec is wanted.
static void add_case(const struct arguments *a, struct evaluation *e, uint32_t codec,
                     const char *name, const char *suffix)
{
    const struct kvd_rotset *set = e->sets[e->n_sets - 1];
    if (!a->codecs[codec] || e->n == EVALUATION_CASES)
        return;
    e->cases[e->n] = (struct kvd_eval_case){set, codec};
    snprintf(e->names[e->n], sizeof(e->names[0]), "%.60s%s", name, suffix);
    e->bits[e->n++] = kvd_eval_bits(codec, set->dim_k, set->dim_v);
}

static bool add_set(struct evaluation *e, struct kvd_rotset *set)
{
    e->sets[e->n_sets] = set;
    e->n_sets += set != NULL;
    return set != NULL;
}

// Takes a copy's clip ratios and gains back to the published ones. Returns whether they were
// others.
static bool publish_terms(struct kvd_rotset *s)
{
    bool differ = false;
    for (uint64_t i = 0; i < (uint64_t)s->n_layers * s->heads; i++) {
        differ |= s->clip_k[i] != 0.96f || s->clip_v[i] != 0.92f || s->gain_k[i] != 1 ||
                  s->gain_v[i] != 1;
        s->clip_k[i] = 0.96f;
        s->clip_v[i] = 0.92f;
        s->gain_k[i] = s->gain_v[i] = 1;
    }
    *s->digest = '\0'; // it is another set now
    return differ;
}

static int open_file(const struct arguments *a, const char *file, struct evaluation *e,
                     struct kvd_error *err)
{
    const char *slash = strrchr(file, '/'), *name = slash ? slash + 1 : file;
    if (!add_set(e, kvd_rotset_open(file, err)))
        return err->code;
    add_case(a, e, KVD_CODEC_INT2, name, "");
    add_case(a, e, KVD_CODEC_INT2C, name, " int2c");
    add_case(a, e, KVD_CODEC_INT2_LM, name, " int2-lm");
    if (!add_set(e, kvd_rotset_clone(e->sets[e->n_sets - 1])))
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (publish_terms(e->sets[e->n_sets - 1]))
        add_case(a, e, KVD_CODEC_INT2, name, " 0.96/0.92");
    return KVD_OK;
}

static int open_sets(const struct arguments *a, const struct kvd_dump *d, struct evaluation *e,
                     struct kvd_error *err)
{
    struct kvd_geometry g = {.head_dim_k = d->dim[KVD_DUMP_K], .head_dim_v = d->dim[KVD_DUMP_V]};
    g.n_layers = d->n_layers;
    memcpy(g.layers, d->layers, sizeof(*g.layers) * d->n_layers);
    if (!add_set(e, kvd_rotset_new("identity", &g, err)))
        return err->code;
    add_case(a, e, KVD_CODEC_INT2, "naive", "");
    if (!add_set(e, kvd_rotset_new("hadamard", &g, err)))
        return err->code;
    add_case(a, e, KVD_CODEC_INT2, "hadamard", "");
    for (uint32_t i = 0; i < a->n_files; i++)
        if (open_file(a, a->files[i], e, err))
            return err->code;
    if (!add_set(e, kvd_rotset_new("random", &g, err)))
        return err->code;
    for (uint32_t codec = KVD_CODEC_TURBOQUANT_2; codec <= KVD_CODEC_TURBOQUANT_4; codec++)
        add_case(a, e, codec, kvd_codec_name(codec), "");
    add_case(a, e, KVD_CODEC_BF16, "bf16", "");
    return e->n ? KVD_OK : kvd_fail(err, KVD_E_INVALID, "no set has a codec of --codecs");
}

static void print_summary(const struct arguments *a, const struct evaluation *e, int mode)
{
    struct table *t =
        table_new("SET, CODEC|>BITS|>OUTPUT ERROR|>WORST LAYER|>WORST HEAD|>LOGIT ERROR|>KL");
    if (mode == 0)
        printf("\nsink %u, recent %u in bf16:\n", a->o.sink, a->o.recent);
    else
        printf("\nno windows:\n");
    for (uint32_t s = 0; s < e->n; s++) {
        uint32_t layer = 0;
        struct kvd_eval_figures f = evaluation_of_layers(e, mode, s, &layer);
        table_cell(t, "%s", e->names[s]);
        table_cell(t, "%.3f", e->bits[s]);
        table_cell(t, "%.4f", f.output_error);
        table_cell(t, "%u", layer);
        table_cell(t, "%.4f", f.worst_head);
        table_cell(t, "%.4f", f.logit_error);
        table_cell(t, "%.5f", f.kl);
    }
    table_print(t, "");
}

static void print_layers(const struct evaluation *e)
{
    char titles[EVALUATION_CASES * 64] = "LAYER";
    for (uint32_t s = 0, at = 5; s < e->n && at + 64 < sizeof(titles); s++)
        at += (uint32_t)snprintf(titles + at, sizeof(titles) - at, "|>%.50s", e->names[s]);
    struct table *t = table_new(titles);
    printf("output error by layer, with windows:\n");
    for (uint32_t i = 0; i < e->n_layers; i++) {
        table_cell(t, "%u", e->layers[i]);
        for (uint32_t s = 0; s < e->n; s++)
            table_cell(t, "%.4f", evaluation_figures(e, 0, s)[i].output_error);
    }
    table_print(t, "");
}

static json_t *json_figures(const struct kvd_eval_figures *f)
{
    return json_pack("{s:f, s:f, s:f, s:f}", "output_error", f->output_error, "worst_head",
                     f->worst_head, "logit_error", f->logit_error, "kl", f->kl);
}

static void print_json(const struct arguments *a, const struct evaluation *e)
{
    json_t *root =
        json_pack("{s:i, s:i, s:i, s:i, s:[]}", "context", (int)a->o.context, "queries",
                  (int)a->o.queries, "sink", (int)a->o.sink, "recent", (int)a->o.recent, "sets");
    for (uint32_t s = 0; s < e->n; s++) {
        const struct kvd_eval_case *c = &e->cases[s];
        json_t *set = json_pack("{s:s, s:s, s:f, s:s, s:s}", "name", e->names[s], "codec",
                                kvd_codec_name(c->codec), "bits", e->bits[s], "digest",
                                c->set->digest, "objective", c->set->objective);
        for (int mode = 0; mode < 2; mode++) {
            uint32_t layer = 0;
            struct kvd_eval_figures f = evaluation_of_layers(e, mode, s, &layer);
            json_t *layers = json_object(), *all = json_figures(&f);
            char id[16];
            for (uint32_t i = 0; i < e->n_layers; i++) {
                snprintf(id, sizeof(id), "%u", e->layers[i]);
                json_object_set_new(layers, id, json_figures(&evaluation_figures(e, mode, s)[i]));
            }
            json_object_set_new(all, "layers", layers);
            json_object_set_new(set, mode ? "no_windows" : "windows", all);
        }
        json_array_append_new(json_object_get(root, "sets"), set);
    }
    json_dumpf(root, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    putchar('\n');
    json_decref(root);
}

static int run_modes(const struct arguments *a, const struct kvd_dump *d, struct evaluation *e,
                     struct kvd_error *err)
{
    struct kvd_eval_options bare = a->o;
    bare.sink = bare.recent = 0;
    uint64_t dim_k = d->dim[KVD_DUMP_K], dim_v = d->dim[KVD_DUMP_V];
    struct kvd_eval_figures *f = calloc(2ull * e->n * d->n_layers, sizeof(*f));
    e->figures = f;
    e->spectra.k = calloc((1 + e->n) * dim_k, sizeof(double));
    e->spectra.v = calloc((1 + e->n) * dim_v, sizeof(double));
    if (!f || !e->spectra.k || !e->spectra.v)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (kvd_eval_run(d, e->cases, e->n, &a->o, f, e->layers, &e->n_layers, &e->spectra, err) ||
        kvd_eval_run(d, e->cases, e->n, &bare, f + (uint64_t)e->n * e->n_layers, e->layers,
                     &e->n_layers, NULL, err))
        return err->code;
    return KVD_OK;
}

int eval_main(int argc, char **argv)
{
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc = "DUMP [SET...]",
        .doc =
            "Evaluates rotation sets (files) and codecs on activations that the sets were not "
            "fitted "
            "to: each set with int2, int2c and int2-lm, and with int2 at the published clip "
            "ratios; "
            "beside them naive int2 (no rotation), the Hadamard matrix, and TurboQuant. Errors are "
            "of attention's outputs "
            "against those over the recorded keys and values; logit error is a root mean square, "
            "KL in nats."};
    struct arguments a = {.o = {.context = 2048,
                                .queries = 64,
                                .sink = 64,
                                .recent = 256,
                                .progress = tool_progress_count,
                                .ctx = "eval"}};
    struct evaluation e = {0};
    struct kvd_error err = {0};
    memset(a.codecs, true, sizeof(a.codecs));
    argp_parse(&argp, argc, argv, 0, NULL, &a);
    struct kvd_dump *d = kvd_dump_open(a.dump, &err);
    int rc = d ? open_sets(&a, d, &e, &err) : err.code;
    if (rc == KVD_OK)
        rc = run_modes(&a, d, &e, &err);
    progress_end();
    if (rc == KVD_OK) {
        if (a.html)
            rc = evaluation_write_html(&e, d, &a.o, a.html, &err);
    }
    if (rc == KVD_OK) {
        if (a.json) {
            print_json(&a, &e);
        } else {
            print_layers(&e);
            print_summary(&a, &e, 0);
            print_summary(&a, &e, 1);
        }
    }
    for (uint32_t s = 0; s < KVD_LEN(e.sets); s++)
        kvd_rotset_free(&e.sets[s]);
    free(e.figures);
    free(e.spectra.k);
    free(e.spectra.v);
    kvd_dump_free(&d);
    return rc ? tool_fail(&err) : EXIT_OK;
}

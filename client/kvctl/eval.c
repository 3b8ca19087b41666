// kvctl calib eval.
#include <argp.h>

#include "client/kvctl/calib_tool.h"
#include "client/kvctl/evaluation.h"

enum { OPT_SINK = 1000, OPT_RECENT, OPT_CONTEXTS, OPT_HTML };

static const struct argp_option options[] = {
    {"context", 'c', "TOKENS", 0, "Tokens attended at a time (default: 2048)", 0},
    {"queries", 'q', "N", 0, "Last positions of a context that ask (default: 64)", 0},
    {"contexts", OPT_CONTEXTS, "N", 0, "At most so many a layer (default: all)", 0},
    {"sink", OPT_SINK, "TOKENS", 0, "Kept in bf16 at the beginning (default: 64)", 0},
    {"recent", OPT_RECENT, "TOKENS", 0, "Kept in bf16 at the end (default: 256)", 0},
    {"threads", 't', "N", 0, "Default: as many as there are cores", 0},
    {"html", OPT_HTML, "FILE", 0, "Also write a report, one file that needs no other", 0},
    {"json", 'j', 0, 0, "Print JSON", 0},
    {0},
};

struct arguments {
    struct kvd_eval_options o;
    const char *dump, *files[EVALUATION_SETS], *html;
    uint32_t n_files;
    bool json;
};

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
    case 'j':
        a->json = true;
        break;
    case ARGP_KEY_ARG:
        if (state->arg_num > EVALUATION_SETS)
            argp_error(state, "at most %d sets at a time", EVALUATION_SETS);
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

static int open_sets(const struct arguments *a, const struct kvd_dump *d, struct evaluation *e,
                     struct kvd_error *err)
{
    struct kvd_geometry g = {.head_dim_k = d->dim[KVD_DUMP_K], .head_dim_v = d->dim[KVD_DUMP_V]};
    g.n_layers = d->n_layers;
    memcpy(g.layers, d->layers, sizeof(*g.layers) * d->n_layers);
    e->names[0] = "naive";
    e->sets[0] = kvd_rotset_identity(&g, err);
    e->names[1] = "hadamard";
    e->sets[1] = kvd_rotset_hadamard(&g, err);
    e->n = 2;
    for (uint32_t i = 0; i < a->n_files; i++, e->n++) {
        const char *slash = strrchr(a->files[i], '/');
        e->names[e->n] = slash ? slash + 1 : a->files[i];
        e->sets[e->n] = kvd_rotset_open(a->files[i], err);
        if (!e->sets[e->n])
            return err->code;
    }
    return e->sets[0] && e->sets[1] ? KVD_OK : err->code;
}

static void print_summary(const struct arguments *a, const struct evaluation *e, int mode)
{
    struct table *t =
        table_new("SET|>BITS|>OUTPUT ERROR|>WORST LAYER|>WORST HEAD|>LOGIT ERROR|>KL");
    if (mode == 0)
        printf("\nsink %u, recent %u in bf16:\n", a->o.sink, a->o.recent);
    else
        printf("\nno windows:\n");
    for (uint32_t s = 0; s < e->n; s++) {
        uint32_t layer = 0;
        struct kvd_eval_figures f = evaluation_of_layers(e, mode, s, &layer);
        table_cell(t, "%s", e->names[s]);
        table_cell(t, "%.3f", e->bits);
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
    char titles[1024] = "LAYER";
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
    json_t *root = json_pack("{s:i, s:i, s:i, s:i, s:f, s:[]}", "context", (int)a->o.context,
                             "queries", (int)a->o.queries, "sink", (int)a->o.sink, "recent",
                             (int)a->o.recent, "bits", e->bits, "sets");
    for (uint32_t s = 0; s < e->n; s++) {
        json_t *set = json_pack("{s:s, s:s, s:s}", "name", e->names[s], "digest",
                                e->sets[s]->digest, "objective", e->sets[s]->objective);
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
    const struct kvd_rotset *sets[EVALUATION_SETS + 2];
    memcpy(sets, e->sets, sizeof(sets));
    bare.sink = bare.recent = 0;
    uint64_t dim_k = d->dim[KVD_DUMP_K], dim_v = d->dim[KVD_DUMP_V];
    struct kvd_eval_figures *f = calloc(2ull * e->n * d->n_layers, sizeof(*f));
    e->figures = f;
    e->spectra.k = calloc((1 + e->n) * dim_k, sizeof(double));
    e->spectra.v = calloc((1 + e->n) * dim_v, sizeof(double));
    if (!f || !e->spectra.k || !e->spectra.v)
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (kvd_eval_run(d, sets, e->n, &a->o, f, e->layers, &e->n_layers, &e->spectra, err) ||
        kvd_eval_run(d, sets, e->n, &bare, f + (uint64_t)e->n * e->n_layers, e->layers,
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
            "Evaluates rotation sets (files) on activations that they were not fitted to, beside "
            "naive int2 (no rotation) and the Hadamard matrix. Errors are of attention's outputs "
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
    argp_parse(&argp, argc, argv, 0, NULL, &a);
    struct kvd_dump *d = kvd_dump_open(a.dump, &err);
    int rc = d ? open_sets(&a, d, &e, &err) : err.code;
    if (rc == KVD_OK)
        rc = run_modes(&a, d, &e, &err);
    progress_end();
    if (rc == KVD_OK) {
        e.bits = kvd_eval_bits(d->dim[KVD_DUMP_K], d->dim[KVD_DUMP_V]);
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

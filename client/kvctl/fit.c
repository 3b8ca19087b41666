// kvctl calib fit.
#include <argp.h>
#include <time.h>

#include "calib/eval.h"
#include "calib/fit.h"
#include "client/kvctl/calib_tool.h"

enum {
    OPT_PER_HEAD = 1000,
    OPT_COMPOSE,
    OPT_CLIP,
    OPT_LAYERS,
    OPT_SPECTRUM,
    OPT_MODEL,
    OPT_STATE,
    OPT_FIT_CLIPS,
    OPT_CONTEXT,
};

static const struct argp_option options[] = {
    {"objective-k", 'k', "NAME", 0, "qqt (default), ktk or hadamard", 0},
    {"objective-v", 'v', "NAME", 0, "sst (default), vtv or hadamard", 0},
    {"compose", OPT_COMPOSE, "NAME", 0, "r_h_pbr (default), r_h, r or top_h", 0},
    {"per-kv-head", OPT_PER_HEAD, 0, 0, "A rotation for each kv head, not one a layer", 0},
    {"clip", OPT_CLIP, "K,V", 0, "Clip ratios (default: 0.96,0.92)", 0},
    {"fit-clips", OPT_FIT_CLIPS, "DUMP", 0,
     "Choose clip ratios and level gains by the output error on these activations", 0},
    {"context", OPT_CONTEXT, "TOKENS", 0, "Of these, attended at a time (default: 2048)", 0},
    {"layers", OPT_LAYERS, "LIST", 0, "Model layer ids, such as 0-35 or 3,7,11 (default: all)", 0},
    {"model", OPT_MODEL, "NAME", 0, "Name of the model (default: what the dump says)", 0},
    {"threads", 't', "N", 0, "Default: as many as there are cores", 0},
    {"state", OPT_STATE, "DIR", 0, "Keep finished layers there; the same command goes on with them",
     0},
    {"spectrum", OPT_SPECTRUM, "FILE", 0, "Also write covariances and eigenvalues (F64)", 0},
    {"json", 'j', 0, 0, "Print JSON", 0},
    {0},
};

struct arguments {
    struct kvd_fit_options o;
    struct kvd_eval_options eval;
    const char *dump, *out, *spectrum, *model, *clips;
    uint16_t layers[KVD_MAX_LAYERS];
    bool json;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct arguments *a = state->input;
    int n = 0;
    switch (key) {
    case 'k':
    case 'v':
        if ((n = kvd_objective_parse(arg)) < 0)
            argp_error(state, "%s is no objective: qqt, ktk, sst, vtv or hadamard", arg);
        *(key == 'k' ? &a->o.k : &a->o.v) = (enum kvd_objective)n;
        break;
    case OPT_COMPOSE:
        if ((n = kvd_composition_parse(arg)) < 0)
            argp_error(state, "%s is no composition: r_h_pbr, r_h, r or top_h", arg);
        a->o.composition = (enum kvd_composition)n;
        break;
    case OPT_PER_HEAD:
        a->o.per_kv_head = true;
        break;
    case OPT_CLIP:
        if (sscanf(arg, "%f,%f%n", &a->o.clip_k, &a->o.clip_v, &n) != 2 || arg[n])
            argp_error(state, "--clip %s: it wants two ratios, such as 0.96,0.92", arg);
        break;
    case OPT_LAYERS:
        a->o.n_layers = kvd_layers_parse(arg, a->layers);
        a->o.layers = a->layers;
        if (a->o.n_layers == 0)
            argp_error(state, "--layers %s: it wants ascending ids, such as 0-35 or 3,7,11", arg);
        break;
    case OPT_FIT_CLIPS:
        a->clips = arg;
        break;
    case OPT_CONTEXT:
        if (sscanf(arg, "%u%n", &a->eval.context, &n) != 1 || arg[n])
            argp_error(state, "--context %s: it wants a number of tokens", arg);
        break;
    case OPT_MODEL:
        a->model = arg;
        break;
    case 't':
        if (sscanf(arg, "%u%n", &a->o.threads, &n) != 1 || arg[n] || a->o.threads == 0)
            argp_error(state, "--threads %s: it wants a number from 1", arg);
        break;
    case OPT_STATE:
        a->o.state = arg;
        break;
    case OPT_SPECTRUM:
        a->spectrum = arg;
        break;
    case 'j':
        a->json = true;
        break;
    case ARGP_KEY_ARG:
        if (state->arg_num > 1)
            argp_usage(state);
        *(state->arg_num == 0 ? &a->dump : &a->out) = arg;
        break;
    case ARGP_KEY_END:
        if (state->arg_num < 2)
            argp_usage(state);
        break;
    default:
        return ARGP_ERR_UNKNOWN;
    }
    return 0;
}

static void on_warning(void *ctx, const char *text)
{
    (void)ctx;
    progress_end();
    fprintf(stderr, "kvctl: warning: %s\n", text);
}

// Eigenvalues of a matrix as the part of the whole that its largest eighth has.
static double concentration(const double *values, uint32_t dim)
{
    double all = 0, top = 0;
    for (uint32_t i = 0; i < dim; i++) {
        all += values[i];
        top += i >= dim - dim / 8 ? values[i] : 0;
    }
    return all > 0 ? top / all : 0;
}

static void print_layers(const struct kvd_fit *f)
{
    const struct kvd_rotset *s = f->set;
    struct table *t = table_new("LAYER|>K: LARGEST EIGHTH|>V: LARGEST EIGHTH");
    for (uint32_t i = 0; i < s->n_layers; i++) {
        table_cell(t, "%u", s->layers[i]);
        for (int v = 0; v < 2; v++) {
            const struct kvd_spectrum *x = v ? &f->v : &f->k;
            uint32_t dim = v ? s->dim_v : s->dim_k;
            double sum = 0;
            for (uint32_t h = 0; x->eigenvalues && h < s->heads; h++)
                sum += concentration(x->eigenvalues + ((uint64_t)i * s->heads + h) * dim, dim);
            if (x->eigenvalues)
                table_cell(t, "%.1f %%", 100 * sum / s->heads);
            else
                table_cell(t, "-");
        }
    }
    table_print(t, "");
    printf("(of the variance, in the largest eighth of the eigenvalues)\n");
}

// By activations that were not fitted to.
static int fit_clips(const struct arguments *a, struct kvd_rotset *set, struct kvd_error *err)
{
    struct kvd_eval_options o = a->eval;
    struct kvd_dump *d = kvd_dump_open(a->clips, err);
    o.threads = a->o.threads;
    int rc = d ? kvd_eval_fit_clips(d, set, &o, err) : err->code;
    kvd_dump_free(&d);
    progress_end();
    if (rc)
        return rc;
    size_t n = strlen(set->objective);
    snprintf(set->objective + n, sizeof(set->objective) - n, ", clips fitted");
    return KVD_OK;
}

static int run(struct arguments *a)
{
    struct kvd_error err = {0};
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    struct kvd_dump *d = kvd_dump_open(a->dump, &err);
    if (!d)
        return tool_fail(&err);
    if (a->model)
        snprintf(d->model, sizeof(d->model), "%s", a->model);
    struct kvd_fit *fit = kvd_fit_run(d, &a->o, &err);
    int rc = fit ? KVD_OK : err.code;
    if (rc == KVD_OK && a->clips)
        rc = fit_clips(a, fit->set, &err);
    if (rc == KVD_OK)
        rc = kvd_rotset_write(fit->set, a->out, &err);
    if (rc == KVD_OK && a->spectrum)
        rc = kvd_fit_write_spectrum(fit, a->spectrum, &err);
    clock_gettime(CLOCK_MONOTONIC, &to);
    double seconds = (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) / 1e9;
    progress_end();
    if (rc == KVD_OK && a->json) {
        json_t *j =
            json_pack("{s:s, s:s, s:s, s:s, s:i, s:f}", "file", a->out, "digest", fit->set->digest,
                      "model", fit->set->model, "objective", fit->set->objective, "layers",
                      (int)fit->set->n_layers, "seconds", seconds);
        json_dumpf(j, stdout, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
        putchar('\n');
        json_decref(j);
    } else if (rc == KVD_OK) {
        print_layers(fit);
        printf("%s: %s, %u layers, %s, in %.1f s\n%s\n", a->out, fit->set->objective,
               fit->set->n_layers, fit->set->provenance, seconds, fit->set->digest);
    }
    kvd_fit_free(&fit);
    kvd_dump_free(&d);
    return rc ? tool_fail(&err) : EXIT_OK;
}

int fit_main(int argc, char **argv)
{
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc = "DUMP OUT",
        .doc = "Fits a rotation set to recorded activations: DUMP is a safetensors file or a "
               "directory of them, with q, k and v after RoPE as [layers, tokens, heads, head_dim] "
               "and metadata layers, or layers.<id>.q, .k and .v as [tokens, heads, head_dim]."};
    struct arguments a = {
        .o = {.k = KVD_FIT_QQT,
              .v = KVD_FIT_SST,
              .clip_k = 0.96f,
              .clip_v = 0.92f,
              .progress = tool_progress,
              .warn = on_warning,
              .ctx = "fit"},
        .eval = {.context = 2048, .queries = 64, .progress = tool_progress_count, .ctx = "clips"}};
    argp_parse(&argp, argc, argv, 0, NULL, &a);
    return run(&a);
}

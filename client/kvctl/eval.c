// kvctl calib eval.
#include "calib/marks.h"
#include "calib/transforms.h"
#include "client/kvctl/calib_tool.h"
#include "client/kvctl/evaluation.h"

#include <math.h>

struct arguments {
    struct kvd_eval_options o;
    const char *dump, *files[EVALUATION_FILES], *html;
    uint32_t n_files;
    bool scales; // each case with other scales too
    bool codecs[KVD_CODEC_COUNT];
};

static int choose_codecs(struct arguments *a, const char *list)
{
    char name[32];
    int n;
    const char *all = list;
    memset(a->codecs, 0, sizeof(a->codecs));
    for (; sscanf(list, "%31[^,]%n", name, &n) == 1; list += n + (list[n] == ',')) {
        uint32_t codec = kvd_codec_find(name);
        if (codec == KVD_CODEC_COUNT)
            return kvctl_usage("--codecs: there is no codec %s; known are %s", name,
                               kvd_codec_names());
        a->codecs[codec] = true;
    }
    char want[256];
    snprintf(want, sizeof(want), "names, separated by commas: %s", kvd_codec_names());
    return *list ? tool_usage("codecs", all, want) : EXIT_OK;
}

// Scales of K and V that are compared.
static const enum kvd_scale compared[EVALUATION_SCALES][2] = {
    {KVD_SCALE_PUBLISHED, KVD_SCALE_PUBLISHED},
    {KVD_SCALE_LEAST_SQUARES, KVD_SCALE_LEAST_SQUARES},
    {KVD_SCALE_UNBIASED, KVD_SCALE_LEAST_SQUARES},
    {KVD_SCALE_UNBIASED, KVD_SCALE_UNBIASED}};

// The name of the next case, as tables can have it. Returns its length.
static int name_case(struct evaluation *e, const char *name, const char *suffix)
{
    char text[KVCTL_TEXT];
    int n =
        snprintf(e->names[e->n], sizeof(e->names[0]), "%.40s%s", kvctl_text(name, text), suffix);
    for (char *bar = e->names[e->n]; (bar = strchr(bar, '|'));) // parts titles of tables
        *bar = '_';
    return n;
}

// Adds a case of the last set, if its codec is wanted; with --scales, one for each pair of them.
static void add_case(const struct arguments *a, struct evaluation *e, uint32_t codec,
                     const char *name, const char *suffix)
{
    const struct kvd_rotset *set = e->sets[e->n_sets - 1];
    uint32_t pairs = a->scales && codec != KVD_CODEC_BF16 ? EVALUATION_SCALES : 1;
    for (uint32_t i = 0; a->codecs[codec] && i < pairs && e->n < EVALUATION_CASES; i++) {
        enum kvd_scale k = pairs > 1 ? compared[i][0] : set->scale_k;
        enum kvd_scale v = pairs > 1 ? compared[i][1] : set->scale_v;
        int n = name_case(e, name, suffix);
        if (pairs > 1)
            snprintf(e->names[e->n] + n, sizeof(e->names[0]) - (size_t)n, ", %s/%s",
                     kvd_scale_name(k), kvd_scale_name(v));
        e->cases[e->n] = (struct kvd_eval_case){set, codec, k, v};
        e->bits[e->n++] = kvd_marks_bits(set, kvd_codecs_both(codec));
    }
}

// The one case that a set of transforms, the last set, has.
static void add_transforms(const struct arguments *a, struct evaluation *e, const char *name)
{
    const struct kvd_rotset *set = e->sets[e->n_sets - 1];
    uint32_t codec = set->transforms->codec;
    char suffix[16];
    if (!a->codecs[codec] || e->n == EVALUATION_CASES)
        return;
    snprintf(suffix, sizeof(suffix), " %s", kvd_codec_name(codec));
    name_case(e, name, suffix);
    e->cases[e->n] = (struct kvd_eval_case){set, codec, KVD_SCALE_UNBIASED, KVD_SCALE_UNBIASED};
    e->bits[e->n++] = kvd_marks_bits(set, kvd_codecs_both(codec));
}

static bool add_set(struct evaluation *e, struct kvd_rotset *set)
{
    e->sets[e->n_sets] = set;
    e->n_sets += set != NULL;
    return set != NULL;
}

// Takes a copy's scales, clip ratios and gains back to the published ones. Returns whether they
// were others.
static bool publish_terms(struct kvd_rotset *s)
{
    bool differ = s->scale_k != KVD_SCALE_PUBLISHED || s->scale_v != KVD_SCALE_PUBLISHED;
    s->scale_k = s->scale_v = KVD_SCALE_PUBLISHED;
    for (uint64_t i = 0; i < (uint64_t)s->n_layers * s->heads; i++) {
        differ |= s->clip_k[i] != 0.96f || s->clip_v[i] != 0.92f || s->gain_k[i] != 1 ||
                  s->gain_v[i] != 1;
        s->clip_k[i] = 0.96f;
        s->clip_v[i] = 0.92f;
        s->gain_k[i] = s->gain_v[i] = 1;
    }
    *s->digest = '\0'; // it is another set now
    free(KVD_TAKE(s->clips_fitted_to));
    return differ;
}

static int open_file(const struct arguments *a, const char *file, struct evaluation *e,
                     struct kvd_error *err)
{
    const char *slash = strrchr(file, '/'), *name = slash ? slash + 1 : file;
    if (!add_set(e, kvd_rotset_open(file, err)))
        return err->code;
    if (e->sets[e->n_sets - 1]->transforms) {
        add_transforms(a, e, name);
        return KVD_OK;
    }
    add_case(a, e, KVD_CODEC_INT2, name, "");
    add_case(a, e, KVD_CODEC_INT2C, name, " int2c");
    add_case(a, e, KVD_CODEC_INT2_LM, name, " int2-lm");
    if (!add_set(e, kvd_rotset_clone(e->sets[e->n_sets - 1])))
        return kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    if (publish_terms(e->sets[e->n_sets - 1]))
        add_case(a, e, KVD_CODEC_INT2, name, " 0.96/0.92");
    return KVD_OK;
}

static struct kvd_rotset *new_set(const struct kvd_dump *d, const char *name, struct kvd_error *err)
{
    return kvd_rotset_new(name, d->layers, d->n_layers, d->dim[KVD_DUMP_K], d->dim[KVD_DUMP_V],
                          err);
}

static int open_sets(const struct arguments *a, const struct kvd_dump *d, struct evaluation *e,
                     struct kvd_error *err)
{
    if (!add_set(e, new_set(d, "identity", err)))
        return err->code;
    add_case(a, e, KVD_CODEC_INT2, "naive", "");
    if (!add_set(e, new_set(d, "hadamard", err)))
        return err->code;
    add_case(a, e, KVD_CODEC_INT2, "hadamard", "");
    for (uint32_t i = 0; i < a->n_files; i++)
        if (open_file(a, a->files[i], e, err))
            return err->code;
    if (!add_set(e, new_set(d, "random", err)))
        return err->code;
    for (uint32_t codec = 0; codec < KVD_CODEC_COUNT; codec++)
        if (strcmp(kvd_codec_transform(codec), "random") == 0)
            add_case(a, e, codec, kvd_codec_name(codec), "");
    add_case(a, e, KVD_CODEC_BF16, "bf16", "");
    return e->n ? KVD_OK : kvd_fail(err, KVD_E_INVALID, "no set has a codec of --codecs");
}

static void print_summary(const struct arguments *a, const struct evaluation *e, int mode)
{
    struct table *t =
        table_new("SET, CODEC|>BITS|>OUTPUT ERROR|>WORST LAYER|>WORST HEAD|>LOGIT ERROR|>BIAS|>KL");
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
        table_cell(t, "%+.3f", f.bias);
        table_cell(t, "%.5f", f.kl);
    }
    table_print(t, "");
}

static void print_activations(const struct evaluation *e)
{
    for (uint32_t s = 0; s < e->n; s++) {
        const char *activations = evaluation_activations(e, e->cases[s].set);
        if (strcmp(activations, "none") != 0 && (!s || e->cases[s].set != e->cases[s - 1].set))
            printf("%s %s\n", e->names[s], evaluation_warning(activations));
    }
}

// Contexts that a set has seen no tokens of: it may do worse there, and the figures of shorter ones
// would not show it.
static void warn_of_lengths(const struct arguments *a, const struct evaluation *e)
{
    for (uint32_t s = 0; s < e->n; s++) {
        const struct kvd_rotset *set = e->cases[s].set;
        if (set->fitted_length && set->fitted_length < a->o.context &&
            (!s || set != e->cases[s - 1].set))
            fprintf(stderr,
                    "kvctl: warning: %s was fitted to contexts of up to %" PRIu64
                    " tokens, and these have %u\n",
                    e->names[s], set->fitted_length, a->o.context);
    }
}

// The least error has chosen sets that lost facts: where another case of no more bits has more
// error, and sees the strongest keys as strong as they are, that is said.
static void warn_of_bias(const struct evaluation *e)
{
    const double enough = 0.1; // nats: a tenth less of what a key gets
    for (uint32_t i = 0; i < e->n; i++) {
        struct kvd_eval_figures best = evaluation_of_layers(e, 0, i, &(uint32_t){0});
        uint32_t better = e->n;
        double least = fabs(best.bias) - enough;
        for (uint32_t j = 0; j < e->n && !kvd_rotset_built_in(e->cases[i].set->objective); j++) {
            struct kvd_eval_figures f = evaluation_of_layers(e, 0, j, &(uint32_t){0});
            if (f.output_error > best.output_error && fabs(f.bias) < least &&
                e->bits[j] <= e->bits[i] && !kvd_rotset_built_in(e->cases[j].set->objective)) {
                least = fabs(f.bias);
                better = j;
            }
        }
        if (better < e->n)
            fprintf(stderr,
                    "kvctl: warning: %s has less error than %s and a worse bias (%+.3f, %+.3f): "
                    "it may lose facts that the other keeps\n",
                    e->names[i], e->names[better], best.bias,
                    evaluation_of_layers(e, 0, better, &(uint32_t){0}).bias);
    }
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
    json_t *all =
        json_pack("{s:f, s:f, s:f, s:f, s:f}", "output_error", f->output_error, "worst_head",
                  f->worst_head, "logit_error", f->logit_error, "bias", f->bias, "kl", f->kl);
    if (f->moved > 0) // where the dump has gradients
        json_object_set_new(all, "moved", json_real(f->moved));
    return all;
}

static void print_json(struct kvctl *k, const struct arguments *a, const struct evaluation *e)
{
    json_t *root =
        json_pack("{s:i, s:i, s:i, s:i, s:[]}", "context", (int)a->o.context, "queries",
                  (int)a->o.queries, "sink", (int)a->o.sink, "recent", (int)a->o.recent, "sets");
    for (uint32_t s = 0; s < e->n; s++) {
        const struct kvd_eval_case *c = &e->cases[s];
        json_t *set = json_pack("{s:o, s:s, s:f, s:s, s:o}", "name", kvctl_text_json(e->names[s]),
                                "codec", evaluation_codec(c), "bits", e->bits[s], "digest",
                                c->set->digest, "objective", kvctl_text_json(c->set->objective));
        json_object_set_new(set, "scale_k", json_string(kvd_scale_name(c->scale_k)));
        json_object_set_new(set, "scale_v", json_string(kvd_scale_name(c->scale_v)));
        json_object_set_new(set, "activations", json_string(evaluation_activations(e, c->set)));
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
    kvctl_print(k, root);
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

// Whether a set says what it was fitted to.
static bool says_what(const struct evaluation *e)
{
    bool any = false;
    for (uint32_t s = 0; s < e->n_sets; s++)
        any |= e->sets[s]->fitted_to || e->sets[s]->clips_fitted_to;
    return any;
}

int cmd_calib_eval(struct kvctl *k)
{
    const char *codecs = kvctl_option(k, "codecs");
    struct arguments a = {.o = {.context = tool_number(k, "context", 2048),
                                .queries = tool_number(k, "queries", 64),
                                .max_contexts = tool_number(k, "contexts", 0),
                                .sink = tool_number(k, "sink", 64),
                                .recent = tool_number(k, "recent", 256),
                                .threads = tool_number(k, "threads", 0),
                                .progress = tool_progress_count,
                                .ctx = "eval"},
                          .dump = k->arguments[0],
                          .scales = kvctl_option(k, "scales"),
                          .html = kvctl_option(k, "html")};
    struct evaluation e = {0};
    struct kvd_error err = {0};
    memset(a.codecs, true, sizeof(a.codecs));
    int code = codecs ? choose_codecs(&a, codecs) : EXIT_OK;
    if (code)
        return code;
    for (unsigned i = 1; i < k->n_arguments; i++)
        a.files[a.n_files++] = k->arguments[i];
    struct kvd_dump *d = NULL;
    if (!a.html || tool_check_out(a.html, &err) == KVD_OK)
        d = kvd_dump_open(a.dump, &err);
    int rc = d ? open_sets(&a, d, &e, &err) : err.code;
    if (rc == KVD_OK && says_what(&e) && !(e.dump = kvd_dump_digests(d, &err)))
        rc = err.code;
    if (rc == KVD_OK)
        rc = run_modes(&a, d, &e, &err);
    progress_end();
    if (rc == KVD_OK) {
        if (a.html)
            rc = evaluation_write_html(&e, d, &a.o, a.html, &err);
    }
    if (rc == KVD_OK) {
        if (k->json) {
            print_json(k, &a, &e);
        } else {
            if (!a.scales) // as wide as there are cases
                print_layers(&e);
            print_summary(&a, &e, 0);
            print_summary(&a, &e, 1);
            print_activations(&e);
        }
        warn_of_lengths(&a, &e);
        warn_of_bias(&e);
    }
    for (uint32_t s = 0; s < KVD_LEN(e.sets); s++)
        kvd_rotset_free(&e.sets[s]);
    free(e.dump);
    free(e.figures);
    free(e.spectra.k);
    free(e.spectra.v);
    kvd_dump_free(&d);
    return rc ? tool_fail(&err) : EXIT_OK;
}

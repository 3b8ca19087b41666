// kvctl calib: rotation sets. With --store or --cache, or with a file, no daemon is asked.
#include "calib/store.h"

#include <errno.h>

#include "calib/marks.h"
#include "calib/transforms.h"
#include "client/kvctl/kvctl.h"

static bool is_file(const char *arg)
{
    return access(arg, R_OK) == 0 || strchr(arg, '/') == arg || strncmp(arg, "./", 2) == 0;
}

static bool is_local(const struct kvctl *k)
{
    return k->store || k->cache;
}

static struct kvd_store_config local_store(const struct kvctl *k)
{
    static char cache[4096];
    const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    if (k->cache)
        snprintf(cache, sizeof(cache), "%s", k->cache);
    else
        snprintf(cache, sizeof(cache), "%s%s/kvd",
                 xdg    ? xdg
                 : home ? home
                        : "/var/tmp",
                 xdg ? "" : "/.cache");
    return (struct kvd_store_config){.url = k->store,
                                     .cache = cache,
                                     .timeout_ms = k->timeout_ms,
                                     .public_key = k->public_key,
                                     .retries = 2,
                                     .option = "--store URL"};
}

// No daemon was asked: what is not there is a store.
static int local_fail(const struct kvd_error *err)
{
    int code = kvctl_fail(err);
    return code == EXIT_UNREACHABLE ? EXIT_FAILED : code;
}

static void on_progress(void *ctx, uint64_t have, uint64_t total)
{
    progress(ctx, have, total);
}

static struct kvd_rotset *fetch_local(struct kvctl *k, const char *ref, struct kvd_error *err)
{
    struct kvd_store_config c = local_store(k);
    struct kvd_rotset *set = NULL;
    if (kvd_store_fetch(&c, ref, on_progress, (void *)ref, &set, NULL, err))
        set = NULL;
    progress_end();
    return set;
}

// What is said where there are none.
static const char *no_entries(bool store)
{
    return store ? "no rotation sets in the store or the cache"
                 : "no store is configured, and the cache has no sets";
}

static int print_entries(struct kvctl *k, Kvd__V1__ListRotationSetsReply *r, bool store)
{
    if (k->json)
        return kvctl_print(k, kvctl_to_json(&r->base));
    struct table *t = table_new("MODEL|TAG|STATE|>BYTES|>USERS|>ERROR|DIGEST");
    for (size_t i = 0; i < r->n_sets; i++) {
        table_cell(t, "%s", r->sets[i]->model);
        table_cell(t, "%s", r->sets[i]->tag);
        table_cell(t, "%s", r->sets[i]->state);
        table_size(t, r->sets[i]->bytes);
        table_cell(t, "%u", r->sets[i]->users);
        table_cell(t, r->sets[i]->error > 0 ? "%.3f" : "-", r->sets[i]->error);
        table_cell(t, "%s", r->sets[i]->digest);
    }
    table_print(t, no_entries(store));
    return EXIT_OK;
}

static int list_local(struct kvctl *k)
{
    struct kvd_store_config c = local_store(k);
    struct kvd_error err = {0};
    struct kvd_store_entry *entries KVD_FREE = NULL;
    uint32_t n;
    if (kvd_store_list(&c, &entries, &n, &err))
        return local_fail(&err);
    Kvd__V1__RotationSetInfo *infos KVD_FREE = calloc(n + 1, sizeof(*infos));
    Kvd__V1__RotationSetInfo **list KVD_FREE = calloc(n + 1, sizeof(*list));
    Kvd__V1__ListRotationSetsReply r = KVD__V1__LIST_ROTATION_SETS_REPLY__INIT;
    for (uint32_t i = 0; infos && list && i < n; i++) {
        kvd__v1__rotation_set_info__init(&infos[i]);
        infos[i].model = entries[i].model;
        infos[i].tag = entries[i].tag;
        infos[i].digest = entries[i].digest;
        infos[i].bytes = entries[i].bytes;
        infos[i].error = entries[i].error;
        infos[i].error_no_windows = entries[i].error_no_windows;
        infos[i].state = entries[i].cached ? "cached" : "store";
        list[r.n_sets++] = &infos[i];
    }
    r.sets = list;
    return print_entries(k, &r, k->store);
}

// Whether the daemon has a store.
static bool has_store(struct kvctl *k)
{
    Kvd__V1__StatusRequest req = KVD__V1__STATUS_REQUEST__INIT;
    Kvd__V1__StatusReply *r = NULL;
    if (kvctl_call(k, "GetStatus", &req, &kvd__v1__status_reply__descriptor, &r))
        return true; // it has said why not
    bool store = *r->store;
    kvd__v1__status_reply__free_unpacked(r, NULL);
    return store;
}

int cmd_calib_ls(struct kvctl *k)
{
    Kvd__V1__ListRotationSetsRequest req = KVD__V1__LIST_ROTATION_SETS_REQUEST__INIT;
    Kvd__V1__ListRotationSetsReply *r = NULL;
    if (is_local(k))
        return list_local(k);
    int code =
        kvctl_call(k, "ListRotationSets", &req, &kvd__v1__list_rotation_sets_reply__descriptor, &r);
    if (code)
        return code;
    code = print_entries(k, r, r->n_sets || k->json || has_store(k));
    kvd__v1__list_rotation_sets_reply__free_unpacked(r, NULL);
    return code;
}

static void layers_text(const struct kvd_rotset *s, char *out, size_t cap)
{
    size_t n = 0;
    out[0] = '\0';
    for (uint32_t i = 0; i < s->n_layers && n + 12 < cap; i++) {
        uint32_t j = i;
        while (j + 1 < s->n_layers && s->layers[j + 1] == s->layers[j] + 1)
            j++;
        n += (size_t)snprintf(out + n, cap - n, j > i ? "%s%u-%u" : "%s%u", i ? "," : "",
                              s->layers[i], s->layers[j]);
        i = j;
    }
}

// What sets of rotations have, and sets of transforms in place of that.
static json_t *json_terms(const struct kvd_rotset *s, double worst)
{
    if (s->transforms)
        return json_pack("{s:s, s:f, s:f}", "codec", kvd_codec_name(s->transforms->codec), "bits",
                         kvd_marks_bits(s, kvd_codecs_both(s->transforms->codec)), "inverses",
                         worst);
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:s, s:s}", "clip_k", (double)s->clip_k[0],
                     "clip_v", (double)s->clip_v[0], "gain_k", (double)s->gain_k[0], "gain_v",
                     (double)s->gain_v[0], "orthogonality", worst, "scale_k",
                     kvd_scale_name(s->scale_k), "scale_v", kvd_scale_name(s->scale_v));
}

static void print_terms(const struct kvd_rotset *s, double worst)
{
    if (s->transforms) {
        uint32_t codec = s->transforms->codec;
        printf("transforms     for codec %s, %.4f bits a value\n", kvd_codec_name(codec),
               kvd_marks_bits(s, kvd_codecs_both(codec)));
        printf("inverses       max |A A^-1 - I| = %.2e\n", worst);
        return;
    }
    printf("clip           K %.3f, V %.3f (first layer)\n", (double)s->clip_k[0],
           (double)s->clip_v[0]);
    printf("gain           K %.3f, V %.3f (first layer)\n", (double)s->gain_k[0],
           (double)s->gain_v[0]);
    printf("scales         K %s, V %s\n", kvd_scale_name(s->scale_k), kvd_scale_name(s->scale_v));
    printf("orthogonality  max |R R^T - I| = %.2e\n", worst);
}

static int print_set(struct kvctl *k, const struct kvd_rotset *s, double worst)
{
    char layers[256], marks[KVD_MARKS_TEXT];
    layers_text(s, layers, sizeof(layers));
    kvd_marks_text(s, marks);
    if (k->json) {
        json_t *set =
            json_pack("{s:o, s:o, s:o, s:o, s:i, s:s, s:i, s:i, s:i}", "model",
                      kvctl_text_json(s->model), "digest", kvctl_text_json(s->digest), "objective",
                      kvctl_text_json(s->objective), "provenance", kvctl_text_json(s->provenance),
                      "n_layers", (int)s->n_layers, "layers", layers, "rotations_per_layer",
                      (int)s->heads, "head_dim_k", (int)s->dim_k, "head_dim_v", (int)s->dim_v);
        if (s->fitted_length)
            json_object_set_new(set, "fitted_length", json_integer((json_int_t)s->fitted_length));
        if (s->n_marks)
            json_object_set_new(set, "marks", json_string(marks));
        json_object_update_new(set, json_terms(s, worst));
        return kvctl_print(k, set);
    }
    char text[KVCTL_TEXT];
    printf("model          %s\n", *s->model ? kvctl_text(s->model, text) : "-");
    printf("digest         %s\n", *s->digest ? s->digest : "- (not a native file)");
    printf("objective      %s\n", kvctl_text(s->objective, text));
    printf("provenance     %s\n", kvctl_text(s->provenance, text));
    if (s->fitted_length)
        printf("fitted         to contexts of up to %" PRIu64 " tokens\n", s->fitted_length);
    printf("layers         %u: %s\n", s->n_layers, layers);
    if (s->heads == 1)
        printf("matrices       one a layer and side\n");
    else
        printf("matrices       %u a layer and side, one per kv head\n", s->heads);
    printf("head_dim       K %u, V %u\n", s->dim_k, s->dim_v);
    if (s->n_marks)
        printf("marks          %s\n", marks);
    print_terms(s, worst);
    return EXIT_OK;
}

// Gives a set the scales of --scales, if there are any.
static void choose_scales(const struct kvctl *k, struct kvd_rotset *set)
{
    const char *scales = kvctl_option(k, "scales");
    if (set && scales)
        kvd_scales_parse(scales, &set->scale_k, &set->scale_v);
}

// A set from a file, or, by name, from the store that --store and --cache say, or else from the
// daemon's.
static struct kvd_rotset *open_set(struct kvctl *k, const char *arg, int *code)
{
    struct kvd_error err = {0};
    struct kvd_rotset *set = NULL;
    if (is_file(arg)) {
        set = kvd_rotset_open(arg, &err);
    } else if (!kvd_store_ref_valid(arg)) {
        kvd_fail(&err, KVD_E_INVALID,
                 "'%s' is neither a file nor a set: say model@tag or sha256:<64 hex>", arg);
    } else {
        set = fetch_local(k, arg, &err);
    }
    *code = set ? EXIT_OK : local_fail(&err);
    return set;
}

static int print_fetched(struct kvctl *k, Kvd__V1__FetchRotationSetReply *r)
{
    if (k->json)
        return kvctl_print_json(k, &r->base);
    const Kvd__V1__RotationSetInfo *s = r->set;
    printf("%s\n%s: %u layers, head_dim %u/%u, %s\n", s->digest, s->model, s->layers, s->head_dim_k,
           s->head_dim_v, s->state);
    kvd__v1__fetch_rotation_set_reply__free_unpacked(r, NULL);
    return EXIT_OK;
}

static int fetch_remote(struct kvctl *k, const char *ref)
{
    Kvd__V1__FetchRotationSetRequest req = KVD__V1__FETCH_ROTATION_SET_REQUEST__INIT;
    Kvd__V1__FetchRotationSetReply *r = NULL;
    req.name = (char *)ref;
    int code = kvctl_operator_call(k, "FetchRotationSet", &req,
                                   &kvd__v1__fetch_rotation_set_reply__descriptor, &r);
    return code ? code : print_fetched(k, r);
}

static int calib_show(struct kvctl *k, const char *arg, bool verify)
{
    int code;
    double worst;
    struct kvd_error err = {0};
    if (!is_file(arg) && !is_local(k) && kvd_store_ref_valid(arg))
        return fetch_remote(k, arg); // the daemon fetches and verifies
    struct kvd_rotset *set = open_set(k, arg, &code);
    if (!set)
        return code;
    int rc = kvd_rotset_check(set, &worst, &err);
    if (rc)
        code = kvctl_fail(&err);
    else if (verify && !k->json)
        printf("good: %u layers, digest %s, max |%s - I| = %.2e\n", set->n_layers,
               *set->digest ? set->digest : "-", set->transforms ? "A A^-1" : "R R^T", worst);
    else
        code = print_set(k, set, worst);
    kvd_rotset_free(&set);
    return code;
}

static const char *store_directory(const struct kvctl *k)
{
    if (!k->store || strncmp(k->store, "http", 4) == 0)
        return NULL;
    return strncmp(k->store, "file://", 7) == 0 ? k->store + 7 : k->store;
}

// name: MODEL@TAG, checked. file, evaluation: may be NULL (store.h).
static int publish(const struct kvctl *k, const char *directory, struct kvd_rotset *set,
                   const char *name, const char *file, json_t *evaluation, struct kvd_error *err)
{
    char model[KVD_MAX_NAME + 1];
    snprintf(model, sizeof(model), "%.*s", (int)strcspn(name, "@"), name);
    return kvd_store_publish(directory, set,
                             &(struct kvd_publish_options){.model = model,
                                                           .tag = strchr(name, '@') + 1,
                                                           .file = file,
                                                           .replace = kvctl_option(k, "replace"),
                                                           .key = k->sign,
                                                           .evaluation = evaluation},
                             err);
}

int cmd_calib_import(struct kvctl *k)
{
    const char *name = k->arguments[2], *at = strchr(name, '@');
    struct kvd_error err = {0};
    char model[KVD_MAX_NAME + 1];
    const char *directory = store_directory(k);
    if (!directory)
        return kvctl_usage("import writes into a directory store: --store DIR");
    snprintf(model, sizeof(model), "%.*s", (int)(at - name), name);
    struct kvd_rotset *set = kvd_rotset_import(k->arguments[0], k->arguments[1], model, &err);
    choose_scales(k, set);
    int rc = set ? publish(k, directory, set, name, NULL, NULL, &err) : err.code;
    if (rc == KVD_OK && k->json)
        kvctl_print(
            k, json_pack("{s:s, s:s, s:s}", "model", model, "tag", at + 1, "digest", set->digest));
    else if (rc == KVD_OK)
        printf("%s@%s is %s\n", model, at + 1, set->digest);
    kvd_rotset_free(&set);
    return rc ? kvctl_fail(&err) : EXIT_OK;
}

static void print_published(struct kvctl *k, const char *name, const char *digest)
{
    if (k->json)
        kvctl_print(k, json_pack("{s:s, s:s}", "set", name, "digest", digest));
    else
        printf("%s is %s\n", name, digest);
}

// Publishes the data-free Hadamard set for a model, so that workers can name it as they will name a
// fitted one.
int cmd_calib_hadamard(struct kvctl *k)
{
    struct kvd_error err = {0};
    uint16_t layers[KVD_MAX_LAYERS];
    const char *directory = store_directory(k), *name = k->arguments[0];
    const char *matrix = kvctl_option(k, "matrix");
    uint32_t n_layers = kvd_layers_parse(k->arguments[1], layers);
    if (!directory)
        return kvctl_usage("hadamard writes into a directory store: --store DIR");
    uint32_t dim = (uint32_t)atoi(k->arguments[2]);
    struct kvd_rotset *set =
        kvd_rotset_new(matrix ? matrix : "hadamard", layers, n_layers, dim, dim, &err);
    choose_scales(k, set);
    if (set)
        snprintf(set->model, sizeof(set->model), "%.*s", (int)strcspn(name, "@"), name);
    int rc = set ? publish(k, directory, set, name, NULL, NULL, &err) : err.code;
    if (rc == KVD_OK)
        print_published(k, name, set->digest);
    kvd_rotset_free(&set);
    return rc ? kvctl_fail(&err) : EXIT_OK;
}

// Of a report of `calib eval --json`, what it says of this set: with int2, or in the codec that its
// transforms are for. NULL with *err.
static json_t *evaluation_of(const char *path, const struct kvd_rotset *s, struct kvd_error *err)
{
    const char *digest = s->digest;
    const char *in = s->transforms ? kvd_codec_name(s->transforms->codec) : "int2";
    json_error_t je;
    json_t *report = json_load_file(path, JSON_REJECT_DUPLICATES, &je), *set, *found = NULL;
    static const char *const terms[] = {"context", "queries", "sink", "recent"};
    size_t i;
    if (!report) {
        kvd_fail(err, KVD_E_INVALID,
                 je.line > 0 ? "%s: no report of calib eval --json: %s, line %d" : "%s: %s", path,
                 je.text, je.line);
        return NULL;
    }
    json_array_foreach(json_object_get(report, "sets"), i, set)
    {
        const char *of = json_string_value(json_object_get(set, "digest"));
        const char *codec = json_string_value(json_object_get(set, "codec"));
        if (found || !of || strcmp(of, digest) != 0 || !codec || strcmp(codec, in) != 0)
            continue;
        found = json_object();
        json_object_set(found, "bits", json_object_get(set, "bits"));
        json_object_set(found, "activations", json_object_get(set, "activations"));
        for (size_t t = 0; t < KVD_LEN(terms); t++)
            json_object_set(found, terms[t], json_object_get(report, terms[t]));
        for (int mode = 0; mode < 2; mode++) {
            json_t *figures = json_copy(json_object_get(set, mode ? "no_windows" : "windows"));
            json_object_del(figures, "layers");
            json_object_set_new(found, mode ? "no_windows" : "windows", figures);
        }
    }
    json_decref(report);
    if (!found)
        kvd_fail(err, KVD_E_INVALID, "%s says nothing of the set %s", path, digest);
    return found;
}

int cmd_calib_publish(struct kvctl *k)
{
    struct kvd_error err = {0};
    const char *directory = store_directory(k), *name = k->arguments[1];
    const char *report = k->n_arguments > 2 ? k->arguments[2] : NULL;
    if (!directory)
        return kvctl_usage("publish writes into a directory store: --store DIR");
    struct kvd_rotset *set = kvd_rotset_open(k->arguments[0], &err);
    if (set && !*set->digest) // no native file: one is made, which says what model it is of
        snprintf(set->model, sizeof(set->model), "%.*s", (int)strcspn(name, "@"), name);
    json_t *evaluation = set && report ? evaluation_of(report, set, &err) : NULL;
    int rc = set && !err.code ? publish(k, directory, set, name, k->arguments[0], evaluation, &err)
                              : err.code;
    if (rc == KVD_OK)
        print_published(k, name, set->digest);
    json_decref(evaluation);
    kvd_rotset_free(&set);
    return rc ? kvctl_fail(&err) : EXIT_OK;
}

int cmd_calib_untag(struct kvctl *k)
{
    struct kvd_error err = {0};
    char digest[KVD_DIGEST_TEXT];
    const char *directory = store_directory(k), *name = k->arguments[0];
    if (!directory)
        return kvctl_usage("untag writes into a directory store: --store DIR");
    if (kvd_store_untag(directory, name, digest, &err))
        return kvctl_fail(&err);
    if (k->json)
        return kvctl_print(k, json_pack("{s:s, s:s}", "set", name, "digest", digest));
    printf("%s no longer names %s\nThe set stays in the store, by that digest and other tags: "
           "'kvctl --cache %s calib gc' removes what no tag names.\n",
           name, digest, directory);
    return EXIT_OK;
}

static int calib_pin(struct kvctl *k, const char *ref, bool pinned)
{
    struct kvd_store_config c = local_store(k);
    struct kvd_error err = {0};
    char digest[KVD_DIGEST_TEXT];
    if (kvd_store_pin(&c, ref, pinned, digest, &err))
        return local_fail(&err);
    if (k->json)
        return kvctl_print(k, json_pack("{s:s, s:b, s:o}", "digest", digest, "pinned", (int)pinned,
                                        "cache", kvctl_text_json(c.cache)));
    printf("%s: %s in the cache %s\n", digest, pinned ? "pinned" : "no longer pinned", c.cache);
    return EXIT_OK;
}

int cmd_calib_pin(struct kvctl *k)
{
    return calib_pin(k, k->arguments[0], true);
}

int cmd_calib_unpin(struct kvctl *k)
{
    return calib_pin(k, k->arguments[0], false);
}

int cmd_calib_gc(struct kvctl *k)
{
    struct kvd_store_config c = local_store(k);
    struct kvd_error err = {0};
    struct kvd_store_gc gc;
    char size[32];
    bool dry = kvctl_option(k, "dry-run");
    if (kvd_store_collect(&c, dry, &gc, &err))
        return kvctl_fail(&err);
    if (k->json)
        return kvctl_print(k, json_pack("{s:i, s:o, s:i, s:b}", "removed", (int)gc.removed, "freed",
                                        kvctl_number_json(gc.freed), "kept", (int)gc.kept, "dry",
                                        (int)dry));
    printf("%s: %s %u sets, %s; %u stay\n", c.cache, dry ? "would remove" : "removed", gc.removed,
           kvd_format_size(gc.freed, size, sizeof(size)), gc.kept);
    return EXIT_OK;
}

int cmd_calib_show(struct kvctl *k)
{
    return calib_show(k, k->arguments[0], false);
}

int cmd_calib_verify(struct kvctl *k)
{
    return calib_show(k, k->arguments[0], true);
}

int cmd_calib_fetch(struct kvctl *k)
{
    return is_local(k) ? calib_show(k, k->arguments[0], false) : fetch_remote(k, k->arguments[0]);
}

// What fits rotation sets lies beside kvctl: it wants OpenBLAS, which an operator's kvctl does not.
static int calib_helper(struct kvctl *k)
{
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 16);
    if (n > 0) {
        snprintf(path + n, sizeof(path) - (size_t)n, "-calib");
        execv(path, k->argv);
    }
    fprintf(
        stderr,
        "kvctl: %s: %s: calib fit and eval are a program of their own; the package kvd-calib "
        "has it, and in a checkout with OpenBLAS 'ninja -C build client/kvctl-calib' makes it\n",
        n > 0 ? path : "kvctl-calib", strerror(errno));
    return EXIT_FAILED;
}

int cmd_calib_fit(struct kvctl *k)
{
    return calib_helper(k);
}

int cmd_calib_eval(struct kvctl *k)
{
    return calib_helper(k);
}

// The report of calib eval: tables, and charts as inline SVG.
#include <math.h>

#include "calib/safetensors.h"
#include "calib/transforms.h"
#include "client/kvctl/evaluation.h"

enum { WIDTH = 720, HEIGHT = 280, LEFT = 60, RIGHT = 20, TOP = 16, BOTTOM = 40 };

static const char *const colours[] = {
    "#9aa0a6", "#e8871e", "#1f6feb", "#2da44e", "#8250df", "#cf222e", "#0a7ea4", "#bf3989",
    "#7a5c00", "#00695c", "#5d4037", "#3949ab", "#d4a72c", "#57606a", "#e85aad", "#116329"};

const struct kvd_eval_figures *evaluation_figures(const struct evaluation *e, int mode, uint32_t i)
{
    return e->figures + ((uint64_t)mode * e->n + i) * e->n_layers;
}

struct kvd_eval_figures evaluation_of_layers(const struct evaluation *e, int mode, uint32_t i,
                                             uint32_t *worst_layer)
{
    const struct kvd_eval_figures *f = evaluation_figures(e, mode, i);
    struct kvd_eval_figures all = {0};
    double worst = -1;
    for (uint32_t l = 0; l < e->n_layers; l++) {
        all.output_error += f[l].output_error * f[l].output_error / e->n_layers;
        all.logit_error += f[l].logit_error / e->n_layers;
        all.kl += f[l].kl / e->n_layers;
        all.bias += f[l].bias / e->n_layers;
        all.moved += f[l].moved * f[l].moved; // errors of layers know nothing of each other
        all.worst_head = fmax(all.worst_head, f[l].worst_head);
        if (f[l].output_error > worst) {
            worst = f[l].output_error;
            *worst_layer = e->layers[l];
        }
    }
    all.output_error = sqrt(all.output_error);
    all.moved = sqrt(all.moved);
    return all;
}

// Text of files and names: nothing in it becomes markup.
static void put_text(FILE *f, const char *text)
{
    for (; *text; text++)
        if (strchr("<>&\"", *text))
            fprintf(f, "&#%d;", *text);
        else
            fputc(*text, f);
}

// -- charts --------------------------------------------------------------------------------------

struct chart {
    FILE *f;
    double x0, x1, y0, y1; // what the axes span
    bool log;              // y
};

static double at_x(const struct chart *c, double x)
{
    double span = c->x1 > c->x0 ? c->x1 - c->x0 : 1;
    return LEFT + (x - c->x0) / span * (WIDTH - LEFT - RIGHT);
}

static double at_y(const struct chart *c, double y)
{
    double part =
        c->log ? log(fmax(y, c->y0) / c->y0) / log(c->y1 / c->y0) : (y - c->y0) / (c->y1 - c->y0);
    return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM);
}

static void chart_begin(struct chart *c, const char *title, const char *x_label)
{
    fprintf(c->f, "<h2>%s</h2>\n<svg viewBox=\"0 0 %d %d\" role=\"img\">\n", title, WIDTH, HEIGHT);
    for (int i = 0; i <= 4; i++) {
        double y = c->log ? c->y0 * pow(c->y1 / c->y0, i / 4.0) : c->y0 + (c->y1 - c->y0) * i / 4;
        fprintf(c->f,
                "<line class=\"grid\" x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\"/>"
                "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.3g</text>\n",
                LEFT, WIDTH - RIGHT, at_y(c, y), at_y(c, y), LEFT - 6, at_y(c, y) + 4, y);
    }
    fprintf(c->f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n",
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label);
}

static void chart_tick(const struct chart *c, double x, double label)
{
    fprintf(c->f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%g</text>\n", at_x(c, x),
            HEIGHT - BOTTOM + 16, label);
}

static void chart_line(const struct chart *c, const char *stroke, const double *x, const double *y,
                       uint32_t n, const char *name)
{
    fprintf(c->f, "<g stroke=\"%s\" fill=\"%s\"><title>", stroke, stroke);
    put_text(c->f, name);
    fprintf(c->f, "</title><polyline fill=\"none\" stroke-width=\"2\" points=\"");
    for (uint32_t i = 0; i < n; i++)
        fprintf(c->f, "%.1f,%.1f ", at_x(c, x[i]), at_y(c, y[i]));
    fprintf(c->f, "\"/>");
    for (uint32_t i = 0; n < 64 && i < n; i++)
        fprintf(c->f, "<circle r=\"3\" cx=\"%.1f\" cy=\"%.1f\"/>", at_x(c, x[i]), at_y(c, y[i]));
    fprintf(c->f, "</g>\n");
}

// Whether a case is in the charts of errors: bf16 has none.
static bool errs(const struct evaluation *e, uint32_t i)
{
    return e->cases[i].set->transforms || e->cases[i].codec != KVD_CODEC_BF16;
}

// Whether a case is in those of spectra: it turns, and not as the case before.
static bool turns(const struct evaluation *e, uint32_t i)
{
    const struct kvd_rotset *a = e->cases[i].set, *b = i ? e->cases[i - 1].set : NULL;
    if (!errs(e, i) || strcmp(a->objective, "identity") == 0)
        return false;
    if (a->transforms || (b && b->transforms))
        return true;
    return !b || a->n_layers != b->n_layers || a->heads != b->heads ||
           memcmp(a->k, b->k,
                  sizeof(*a->k) * a->n_layers * a->heads * (uint64_t)a->dim_k * a->dim_k) != 0;
}

// `first`, if there is one, is the black line of a chart that has one line a set.
static void chart_end(const struct chart *c, const struct evaluation *e, const char *first)
{
    fprintf(c->f, "</svg>\n<p class=\"legend\">");
    if (first)
        fprintf(c->f, "<span style=\"--c:#111\">%s</span> ", first);
    for (uint32_t s = 0; s < e->n; s++) {
        if (!(first ? turns(e, s) : errs(e, s)))
            continue;
        fprintf(c->f, "<span style=\"--c:%s\">", colours[s % KVD_LEN(colours)]);
        put_text(c->f, e->names[s]);
        fprintf(c->f, "</span> ");
    }
    fprintf(c->f, "</p>\n");
}

// A logarithmic axis of errors over what any layer of the charted cases has.
static void error_axis(struct chart *c, const struct evaluation *e, int mode)
{
    c->log = true;
    c->y0 = INFINITY;
    c->y1 = 0;
    for (uint32_t s = 0; s < e->n; s++)
        for (uint32_t i = 0; errs(e, s) && i < e->n_layers; i++) {
            double y = evaluation_figures(e, mode, s)[i].output_error;
            c->y1 = fmax(c->y1, y * 1.1);
            if (y > 0)
                c->y0 = fmin(c->y0, y / 1.1);
        }
    c->y1 = c->y1 > 0 ? c->y1 : 1;
    c->y0 = c->y0 < c->y1 ? c->y0 : c->y1 / 10;
}

static void errors_by_layer(FILE *f, const struct evaluation *e, int mode)
{
    struct chart c = {.f = f, .x0 = 0, .x1 = e->n_layers - 1};
    double x[KVD_MAX_LAYERS], y[KVD_MAX_LAYERS];
    error_axis(&c, e, mode);
    chart_begin(&c,
                mode ? "Output error by layer, no windows" : "Output error by layer, with windows",
                "layer");
    for (uint32_t i = 0; i < e->n_layers; i += 1 + e->n_layers / 16)
        chart_tick(&c, i, e->layers[i]);
    for (uint32_t s = 0; s < e->n; s++) {
        if (!errs(e, s))
            continue;
        for (uint32_t i = 0; i < e->n_layers; i++) {
            x[i] = i;
            y[i] = evaluation_figures(e, mode, s)[i].output_error;
        }
        chart_line(&c, colours[s % KVD_LEN(colours)], x, y, e->n_layers, e->names[s]);
    }
    chart_end(&c, e, NULL);
}

static void errors_by_bits(FILE *f, const struct evaluation *e)
{
    struct chart c = {.f = f, .x0 = 2, .x1 = 2.5};
    uint32_t layer;
    for (uint32_t s = 0; s < e->n; s++)
        if (errs(e, s))
            c.x1 = fmax(c.x1, ceil(e->bits[s] * 2) / 2);
    error_axis(&c, e, 0);
    chart_begin(&c, "Output error by bits, with windows", "bits a value, parameters included");
    for (int i = 0; c.x0 + i / 4.0 <= c.x1; i++)
        chart_tick(&c, c.x0 + i / 4.0, c.x0 + i / 4.0);
    for (uint32_t s = 0; s < e->n; s++) {
        double y = evaluation_of_layers(e, 0, s, &layer).output_error;
        if (errs(e, s))
            chart_line(&c, colours[s % KVD_LEN(colours)], &e->bits[s], &y, 1, e->names[s]);
    }
    chart_end(&c, e, NULL);
}

static void spectrum(FILE *f, const struct evaluation *e, const double *shares, uint32_t dim,
                     const char *title)
{
    struct chart c = {.f = f, .x0 = 1, .x1 = dim, .log = true, .y0 = 1e-4, .y1 = 1};
    double x[KVD_MAX_HEAD_DIM];
    for (uint32_t i = 0; i < dim; i++)
        x[i] = i + 1;
    chart_begin(&c, title, "channels, by their share");
    for (uint32_t i = 0; i <= 4; i++)
        chart_tick(&c, KVD_MAX(i * dim / 4, 1u), KVD_MAX(i * dim / 4, 1u));
    chart_line(&c, "#111", x, shares, dim, "as recorded");
    for (uint32_t s = 0; s < e->n; s++)
        if (turns(e, s))
            chart_line(&c, colours[s % KVD_LEN(colours)], x, shares + (uint64_t)(1 + s) * dim, dim,
                       e->names[s]);
    chart_end(&c, e, "as recorded");
}

// -- tables --------------------------------------------------------------------------------------

static void summary(FILE *f, const struct evaluation *e, int mode)
{
    fprintf(f, "<table><tr><th>set, codec<th>bits<th>output error<th>worst layer<th>worst head"
               "<th>logit error<th>bias<th>KL\n");
    for (uint32_t s = 0; s < e->n; s++) {
        uint32_t layer = 0;
        struct kvd_eval_figures x = evaluation_of_layers(e, mode, s, &layer);
        fprintf(f, "<tr><td title=\"%s\">", e->cases[s].set->digest);
        put_text(f, e->names[s]);
        fprintf(f, "<td>%.3f<td>%.4f<td>%u<td>%.4f<td>%.4f<td>%+.3f<td>%.5f\n", e->bits[s],
                x.output_error, layer, x.worst_head, x.logit_error, x.bias, x.kl);
    }
    fprintf(f, "</table>\n");
}

static void by_layer(FILE *f, const struct evaluation *e)
{
    fprintf(f, "<h2>Every layer, with windows</h2>\n<div><table><tr><th>layer");
    for (uint32_t s = 0; s < e->n; s++) {
        fprintf(f, "<th>");
        put_text(f, e->names[s]);
    }
    for (uint32_t i = 0; i < e->n_layers; i++) {
        fprintf(f, "\n<tr><td>%u", e->layers[i]);
        for (uint32_t s = 0; s < e->n; s++)
            fprintf(f, "<td>%.4f", evaluation_figures(e, 0, s)[i].output_error);
    }
    fprintf(f, "\n</table></div>\n");
}

static const char style[] =
    "body{font:15px/1.5 system-ui,sans-serif;max-width:760px;margin:2em auto;padding:0 1em;"
    "color:#1f2328}h1{font-size:1.5em}h2{font-size:1.1em;margin:2em 0 .3em}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}"
    "th,td{text-align:right;padding:.25em .6em;border-bottom:1px solid #d8dee4}"
    "th:first-child,td:first-child{text-align:left}svg{width:100%;height:auto}"
    "svg text{font-size:11px;fill:#57606a}.grid{stroke:#d8dee4}"
    "div{overflow-x:auto}.legend span{white-space:nowrap;margin-right:1em}.legend "
    "span::before{content:\"\";"
    "display:inline-block;width:.8em;height:.8em;margin-right:.35em;background:var(--c)}";

static void page(FILE *f, const struct evaluation *e, const struct kvd_dump *d,
                 const struct kvd_eval_options *o)
{
    fprintf(f,
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width\"><title>Rotation sets</title>\n"
            "<style>%s</style>\n<h1>Rotation sets on recorded activations",
            style);
    if (*d->model) {
        fprintf(f, " of ");
        put_text(f, d->model);
    }
    fprintf(
        f,
        "</h1>\n<p>Attention over quantized keys and values against the recorded ones. %u "
        "layers, %u query and %u kv heads, head_dim %u; contexts of %u tokens, whose last %u "
        "positions ask. The codec is int2 where none is named; bits are those of a value, with its "
        "share of the parameters. Output error is relative (L2), worst head a kv head's, logit "
        "error a root mean square, bias the mean error of a query's logit at its strongest "
        "quantized key, KL in nats.</p>\n",
        e->n_layers, d->heads[KVD_DUMP_Q], d->heads[KVD_DUMP_K], d->dim[KVD_DUMP_K], o->context,
        o->queries);
    for (uint32_t s = 0; s < e->n; s++) {
        const char *activations = evaluation_activations(e, e->cases[s].set);
        if (strcmp(activations, "none") == 0 || (s && e->cases[s].set == e->cases[s - 1].set))
            continue;
        fprintf(f, "<p><b>");
        put_text(f, e->names[s]);
        fprintf(f, "</b> %s.</p>\n", evaluation_warning(activations));
    }
    fprintf(f, "<h2>Sink %u and recent %u in bf16</h2>\n", o->sink, o->recent);
    summary(f, e, 0);
    fprintf(f, "<h2>No windows</h2>\n");
    summary(f, e, 1);
    errors_by_layer(f, e, 0);
    errors_by_layer(f, e, 1);
    errors_by_bits(f, e);
    spectrum(f, e, e->spectra.k, d->dim[KVD_DUMP_K],
             "Energy of K's channels, before and after rotation");
    spectrum(f, e, e->spectra.v, d->dim[KVD_DUMP_V],
             "Energy of V's channels, before and after rotation");
    by_layer(f, e);
    fprintf(f, "</html>\n");
}

const char *evaluation_codec(const struct kvd_eval_case *c)
{
    return c->set->transforms ? kvd_codec_name(c->set->transforms->codec)
                              : kvd_codec_name(c->codec);
}

const char *evaluation_activations(const struct evaluation *e, const struct kvd_rotset *set)
{
    return kvd_rotset_built_in(set->objective)                    ? "none"
           : kvd_dump_digests_meet(set->fitted_to, e->dump)       ? "fitted"
           : kvd_dump_digests_meet(set->clips_fitted_to, e->dump) ? "clips-fitted"
           : set->fitted_to                                       ? "held-out"
                                                                  : "unknown";
}

const char *evaluation_warning(const char *activations)
{
    return strcmp(activations, "fitted") == 0
               ? "was fitted to these activations: its figures are better than on others"
           : strcmp(activations, "clips-fitted") == 0
               ? "has clip ratios fitted to these activations: its figures are better than on "
                 "others"
           : strcmp(activations, "unknown") == 0
               ? "does not say what it was fitted to; it may have been these activations"
               : "was not fitted to these activations";
}

int evaluation_write_html(const struct evaluation *e, const struct kvd_dump *d,
                          const struct kvd_eval_options *o, const char *path, struct kvd_error *err)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (f)
        page(f, e, d, o);
    bool ok = f && fclose(f) == 0;
    int rc =
        ok ? kvd_write_file(path, text, size, err) : kvd_fail(err, KVD_E_INTERNAL, "out of memory");
    free(text);
    return rc;
}

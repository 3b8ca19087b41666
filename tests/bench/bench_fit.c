// kvctl calib fit's work in the shape of Qwen3-8B's layers, against the same flops in OpenBLAS
// alone. usage: bench_fit [LAYERS [TOKENS]]
#include <cblas.h>
#include <lapacke.h>
#include <math.h>
#include <time.h>

#include "calib/fit.h"

enum { Q_HEADS = 32, KV_HEADS = 8, DIM = 128 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void write_dump(const char *path, uint64_t tokens)
{
    struct kvd_error err = {0};
    struct kvd_tensor_source t[3];
    uint32_t heads[3] = {Q_HEADS, KV_HEADS, KV_HEADS}, x = 1;
    static const char *const names[3] = {"layers.0.q", "layers.0.k", "layers.0.v"};
    for (int s = 0; s < 3; s++) {
        uint64_t n = tokens * heads[s] * DIM;
        uint16_t *data = malloc(n * 2);
        for (uint64_t i = 0; i < n; i++) { // bf16 between 1/8 and 2, of either sign
            x = x * 1664525u + 1013904223u;
            data[i] = (uint16_t)(0x3e00 + (x >> 20) % 0x200 + (x >> 31) * 0x8000);
        }
        t[s] =
            (struct kvd_tensor_source){names[s], KVD_TENSOR_BF16, 3, {tokens, heads[s], DIM}, data};
    }
    size_t size;
    uint8_t *file = kvd_safetensors_render(t, 3, json_object(), NULL, &size);
    if (!file || kvd_write_file(path, file, size, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(1);
    }
    free(file);
    for (int s = 0; s < 3; s++)
        free((void *)t[s].data);
}

// Seconds of the products and eigenvalues of one layer, on all cores.
static double openblas_alone(uint64_t tokens)
{
    uint64_t rows = 8192, group = Q_HEADS / KV_HEADS;
    double *a = malloc(rows * DIM * sizeof(*a)), *w = malloc(rows * DIM * sizeof(*w));
    double c[DIM * DIM] = {0}, values[DIM], t;
    for (uint64_t i = 0; i < rows * DIM; i++)
        a[i] = sin((double)i);
    double syrk = 1e9, symm = 1e9, eig = 1e9;
    for (int k = 0; k < 5; k++) {
        t = now();
        cblas_dsyrk(CblasRowMajor, CblasUpper, CblasTrans, DIM, (int)rows, 1, a, DIM, 0, c, DIM);
        syrk = fmin(syrk, now() - t);
        t = now();
        cblas_dsymm(CblasRowMajor, CblasRight, CblasUpper, (int)rows, DIM, 1, c, DIM, a, DIM, 0, w,
                    DIM);
        symm = fmin(symm, now() - t);
        t = now();
        LAPACKE_dsyevd(LAPACK_ROW_MAJOR, 'V', 'U', DIM, c, DIM, values);
        eig = fmin(eig, now() - t);
    }
    free(a);
    free(w);
    return KV_HEADS * (double)tokens / (double)rows * ((double)(group + 1) * syrk + symm) + 2 * eig;
}

int main(int argc, char **argv)
{
    uint32_t layers = argc > 1 ? (uint32_t)atoi(argv[1]) : 4;
    uint64_t tokens = argc > 2 ? strtoull(argv[2], NULL, 10) : 8192;
    double alone = openblas_alone(tokens) * layers;
    struct kvd_error err = {0};
    char path[] = "/tmp/kvd-bench-fit.XXXXXX";
    close(mkstemp(path));
    write_dump(path, tokens);
    // The same file again and again under other layer ids would be one layer: fit it that often.
    struct kvd_dump *d = kvd_dump_open(path, &err);
    struct kvd_fit_options o = {.k = KVD_FIT_QQT, .v = KVD_FIT_SST, .clip_k = 1, .clip_v = 1};
    for (uint32_t i = 1; d && i < layers; i++) {
        d->pieces = realloc(d->pieces, (i + 1) * sizeof(*d->pieces));
        d->pieces[i] = d->pieces[0];
        d->pieces[i].layer = i;
        d->layers[i] = (uint16_t)i;
        d->tokens[i] = tokens;
        d->n_layers = d->n_pieces = i + 1;
    }
    double t = now();
    struct kvd_fit *fit = d ? kvd_fit_run(d, &o, &err) : NULL;
    t = now() - t;
    unlink(path);
    if (!fit) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    printf("fit of %u layers x %llu tokens, %d/%d heads of %d: %.2f s; the same flops in dsyrk, "
           "dsymm and "
           "dsyevd on all cores: %.2f s (%.2f times)\n",
           layers, (unsigned long long)tokens, Q_HEADS, KV_HEADS, DIM, t, alone, t / alone);
    kvd_fit_free(&fit);
    kvd_dump_free(&d);
    return 0;
}

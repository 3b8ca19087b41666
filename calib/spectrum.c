// Eigenbases and the rotations composed of them.
#include <cblas.h>
#include <lapacke.h>
#include <math.h>

#include "calib/fit.h"

enum { MAX_DIM = KVD_MAX_HEAD_DIM };

// The largest component of column j positive, the first of equals.
static void fix_sign(double *u, uint32_t dim, uint32_t j)
{
    uint32_t top = 0;
    for (uint32_t i = 1; i < dim; i++)
        if (fabs(u[i * dim + j]) > fabs(u[top * dim + j]) * (1 + 1e-9))
            top = i;
    if (u[top * dim + j] < 0)
        for (uint32_t i = 0; i < dim; i++)
            u[i * dim + j] = -u[i * dim + j];
}

// Columns [a, b) span one eigenspace: any basis of it would do, and LAPACK's depends on rounding.
// Takes the unit vector that lies deepest in what is left of the space, again and again.
// from: memory for [dim][b - a].
static void fix_basis(double *u, uint32_t dim, uint32_t a, uint32_t b, double *from)
{
    uint32_t n = b - a;
    for (uint32_t i = 0; i < dim; i++)
        memcpy(&from[i * n], &u[i * dim + a], n * sizeof(*from));
    for (uint32_t j = 0; j < n; j++) {
        uint32_t best = 0;
        double depth = -1;
        for (uint32_t i = 0; i < dim; i++) {
            double d = cblas_ddot((int)n, &from[i * n], 1, &from[i * n], 1);
            if (d > depth * (1 + 1e-9)) {
                depth = d;
                best = i;
            }
        }
        // c: coordinates of the unit vector's projection; u_j = from c; then c leaves the space.
        double c[MAX_DIM];
        for (uint32_t k = 0; k < n; k++)
            c[k] = from[best * n + k] / sqrt(depth);
        for (uint32_t i = 0; i < dim; i++) {
            double x = cblas_ddot((int)n, &from[i * n], 1, c, 1);
            u[i * dim + a + j] = x;
            cblas_daxpy((int)n, -x, c, 1, &from[i * n], 1);
        }
    }
}

int kvd_eigenbasis(const double *c, uint32_t dim, double *values, double *u, struct kvd_error *err)
{
    size_t bytes = (size_t)dim * dim * sizeof(*u);
    double *scratch KVD_FREE = malloc(bytes);
    if (!scratch) {
        kvd_fail(err, KVD_E_INTERNAL, "out of memory");
        return -1;
    }
    memcpy(u, c, bytes);
    lapack_int rc = LAPACKE_dsyevd(LAPACK_ROW_MAJOR, 'V', 'L', (int)dim, u, (int)dim, values);
    if (rc) {
        kvd_fail(err, KVD_E_INTERNAL, "dsyevd failed: %d", (int)rc);
        return -1;
    }
    double top = values[dim - 1], close = top * 1e-14 * dim; // rounding
    int rank = 0;
    for (uint32_t a = 0, b; a < dim; a = b) {
        for (b = a + 1; b < dim && values[b] - values[b - 1] <= close; b++)
            ;
        if (b - a > 1)
            fix_basis(u, dim, a, b, scratch);
        for (uint32_t j = a; j < b; j++) {
            fix_sign(u, dim, j);
            rank += values[j] > top * 1e-10;
        }
    }
    return rank;
}

// Row times the Hadamard matrix / sqrt(n), of an n that is no power of two.
static void paley_row(double *x, uint32_t n)
{
    double y[MAX_DIM] = {0};
    for (uint32_t i = 0; i < n; i++)
        for (uint32_t j = 0; j < n; j++)
            y[j] += x[i] * kvd_hadamard_entry(n, i, j);
    for (uint32_t j = 0; j < n; j++)
        x[j] = y[j] / sqrt(n);
}

// The same of any head_dim.
static void hadamard_row(double *x, uint32_t n)
{
    if (n & (n - 1)) {
        paley_row(x, n);
        return;
    }
    for (uint32_t half = 1; half < n; half *= 2)
        for (uint32_t i = 0; i < n; i += 2 * half)
            for (uint32_t j = i; j < i + half; j++) {
                double a = x[j], b = x[j + half];
                x[j] = a + b;
                x[j + half] = a - b;
            }
    double scale = 1 / sqrt(n);
    for (uint32_t i = 0; i < n; i++)
        x[i] *= scale;
}

static uint32_t bit_reversed(uint32_t i, uint32_t n)
{
    uint32_t r = 0;
    for (uint32_t bit = 1; bit < n; bit *= 2)
        r = r * 2 + (i & bit ? 1 : 0);
    return r;
}

void kvd_compose(const double *u, uint32_t dim, enum kvd_composition composition, double *r)
{
    memcpy(r, u, (size_t)dim * dim * sizeof(*r));
    if (composition == KVD_COMPOSE_R)
        return;
    for (uint32_t i = 0; i < dim; i++) {
        double row[MAX_DIM];
        if (composition == KVD_COMPOSE_TOP_H) {
            for (uint32_t j = 0; j < dim; j++)
                r[i * dim + j] = u[i * dim + dim - 1 - j];
            hadamard_row(&r[i * dim], dim);
            continue;
        }
        hadamard_row(&r[i * dim], dim);
        if (composition == KVD_COMPOSE_R_H)
            continue;
        // Eigenvalues ascend: the i-th largest has index dim - 1 - i.
        memcpy(row, &r[i * dim], dim * sizeof(*row));
        for (uint32_t j = 0; j < dim; j++)
            r[i * dim + bit_reversed(j, dim)] = row[dim - 1 - j];
    }
}

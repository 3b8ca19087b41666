// Hadamard matrices of every head_dim: Sylvester's of a power of two, times, as Kronecker products,
// Paley's of 12, 20 or
// 28. Entries are 1 and -1; the first row is all ones.
#include "calib/rotset.h"

// Whether a is a square modulo the prime q: 1, -1, or 0 for 0.
static int legendre(int a, int q)
{
    a = (a % q + q) % q;
    for (int x = 1; x <= q / 2; x++)
        if (x * x % q == a)
            return 1;
    return a ? -1 : 0;
}

// Entry of a conference matrix of order q + 1; for q = 1 mod 4 symmetric, for q = 3 mod 4 skew.
static int conference(int q, int i, int j)
{
    if (i == 0 || j == 0)
        return i == j ? 0 : i == 0 || q % 4 == 1 ? 1 : -1;
    return legendre(i - j, q);
}

static int paley(uint32_t order, uint32_t i, uint32_t j)
{
    static const int of_one[2][2] = {{1, 1}, {1, -1}}, of_zero[2][2] = {{1, -1}, {-1, -1}};
    if (order == 1)
        return 1;
    if (order != 28) // order - 1 is a prime, 3 mod 4
        return i == j ? 1 : conference((int)order - 1, (int)i, (int)j);
    // order / 2 - 1 = 13 is a prime, 1 mod 4. Columns whose first entry is -1 are turned.
    int c = conference(13, (int)i / 2, (int)j / 2);
    int entry = c ? c * of_one[i % 2][j % 2] : of_zero[i % 2][j % 2];
    return j == 1 ? -entry : entry;
}

int kvd_hadamard_entry(uint32_t dim, uint32_t i, uint32_t j)
{
    static const uint32_t orders[] = {1, 12, 20, 28};
    for (size_t k = 0; k < KVD_LEN(orders); k++) {
        uint32_t m = orders[k];
        if (dim % m == 0 && (dim / m & (dim / m - 1)) == 0)
            return (__builtin_popcount(i / m & j / m) & 1 ? -1 : 1) * paley(m, i % m, j % m);
    }
    return 0;
}

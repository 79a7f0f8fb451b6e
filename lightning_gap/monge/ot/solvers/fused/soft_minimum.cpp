// Passes over all pairs of samples: costs, exponentials, sums and gradients, without a matrix.
//
// A group of rows x meets the columns y tile by tile, and a tile ROWS rows at a time: the costs and exponents of these stay
// in the first cache, and what they add up to in registers. The columns lie tile by tile, and in a tile by coordinates, so
// that neighbours are taken as one vector; the last tile is filled up by columns of offset -1e30. Exponents are taken in
// the type S, exponentials in K, sums over tiles in double.

#include <algorithm>
#include <cmath>
#include <vector>

#include "formula.h"

namespace {

constexpr long ROWS = 4, MOST_COLUMNS = 512;

template <class S> struct Samples {
    const S *x, *y, *offsets;  // (n, d), (tiles, d, width), (tiles * width,)
    long n, d, tiles, width;
    S scale, q;
};

// Sums over the coordinates, for ROWS rows and the columns from one on: of terms, or of products.
template <class S, long L, bool PRODUCTS>
INLINE void sums_over_coordinates(const Samples<S>& of, const S* const* rows, const S* y, Vec<S, L>* s) {
    for (int r = 0; r < ROWS; ++r) s[r] = Vec<S, L>{};
    for (long k = 0; k < of.d; ++k, y += of.width) {
        const Vec<S, L> yk = load<S, L>(y);
        for (int r = 0; r < ROWS; ++r) s[r] += PRODUCTS ? yk * rows[r][k] : term(rows[r][k] - yk, of.q);
    }
}

// The last rows of all are repeated where there are less than ROWS.
template <class S> INLINE void rows_from(const Samples<S>& of, long first, const S** rows) {
    for (long r = 0; r < ROWS; ++r) rows[r] = of.x + std::min(first + r, of.n - 1) * of.d;
}

// F_i = -share * log sum_j exp(own_i + offset_j - cost_ij); where columns are asked for, they get besides what they have
// sum_i a_i exp(F_i + own_i + offset_j - cost_ij).
template <class S, class K, bool PRODUCTS>
void pass(const Samples<S>& of, long group, const double* own, double share, double* F, const double* a, double* columns) {
    constexpr long L = VECTOR_BYTES / sizeof(S);
    const long padded = of.tiles * of.width;
    std::vector<double> tops(group * of.tiles), sums(group * of.tiles);
    std::vector<K> strip(columns ? group * padded : 0);
    alignas(VECTOR_BYTES) S exponents[ROWS][MOST_COLUMNS];
    const S* rows[ROWS];
    for (long start = 0; start < of.n; start += group) {
        const long height = std::min(group, of.n - start);
        for (long t = 0; t < of.tiles; ++t) {
            const S *y = of.y + t * of.d * of.width, *offsets = of.offsets + t * of.width;
            for (long i = 0; i < height; i += ROWS) {
                rows_from(of, start + i, rows);
                Vec<S, L> top[ROWS], s[ROWS];
                for (int r = 0; r < ROWS; ++r) top[r] = all<S, L>(S(-INFINITY));
                for (long j = 0; j < of.width; j += L) {
                    sums_over_coordinates<S, L, PRODUCTS>(of, rows, y + j, s);
                    const Vec<S, L> offset = load<S, L>(offsets + j);
                    for (int r = 0; r < ROWS; ++r) {
                        const Vec<S, L> e = PRODUCTS ? offset + s[r] : offset - of.scale * outer(s[r], of.q);
                        store<S, L>(&exponents[r][j], e);
                        top[r] = e > top[r] ? e : top[r];
                    }
                }
                for (long r = 0; r < ROWS; ++r) {
                    const S most = largest_of<S, L>(top[r]);
                    Vec<K, L> sum = Vec<K, L>{};
                    K* kept = columns ? &strip[(i + r) * padded + t * of.width] : nullptr;
                    for (long j = 0; j < of.width; j += L) {
                        const Vec<S, L> e = load<S, L>(&exponents[r][j]) - most;
                        const Vec<K, L> part = exponential_of<K, L>(__builtin_convertvector(e, Vec<K, L>));
                        sum += part;
                        if (columns) store<K, L>(kept + j, part);
                    }
                    tops[(i + r) * of.tiles + t] = most;
                    sums[(i + r) * of.tiles + t] = sum_of<K, L>(sum);
                }
            }
        }
        for (long i = 0; i < height; ++i) {
            double *top = &tops[i * of.tiles], sum = 0;
            const double most = *std::max_element(top, top + of.tiles), shift = own[start + i];
            for (long t = 0; t < of.tiles; ++t) sum += sums[i * of.tiles + t] * std::exp(top[t] - most);
            F[start + i] = -share * (most + shift + std::log(sum));
            // From here on the weight of a row's part.
            if (columns)
                for (long t = 0; t < of.tiles; ++t) top[t] = a[start + i] * std::exp(F[start + i] + shift + top[t]);
        }
        for (long t = 0; columns && t < of.tiles; ++t)
            for (long j = t * of.width; j < (t + 1) * of.width; j += L) {
                Vec<double, L> column = load<double, L>(columns + j);
                for (long i = 0; i < height; i += ROWS) {
                    Vec<K, L> sum = Vec<K, L>{};
                    for (long r = i; r < std::min(i + ROWS, height); ++r)
                        sum += K(tops[r * of.tiles + t]) * load<K, L>(&strip[r * padded + j]);
                    column += __builtin_convertvector(sum, Vec<double, L>);
                }
                store<double, L>(columns + j, column);
            }
    }
}

// With P_ij = exp(F_i + offset_j - cost_ij): sums over j of P_ij times the cost's gradient in x_i, (n, d), and the rows'
// masses. As products, x_i and 2 scale (x_i sum_j P_ij - sum_j P_ij y_j).
template <class S, class K, bool PRODUCTS>
void pull(const Samples<S>& of, long group, const double* F, double* gradients, double* masses) {
    constexpr long L = VECTOR_BYTES / sizeof(S);
    alignas(VECTOR_BYTES) S shares[ROWS][MOST_COLUMNS];
    const S* rows[ROWS];
    std::fill(gradients, gradients + of.n * of.d, 0.0);
    std::fill(masses, masses + of.n, 0.0);
    for (long start = 0; start < of.n; start += group)
        for (long t = 0; t < of.tiles; ++t)
            for (long i = start; i < std::min(start + group, of.n); i += ROWS) {
                const S *y = of.y + t * of.d * of.width, *offsets = of.offsets + t * of.width;
                const long height = std::min(ROWS, of.n - i);
                rows_from(of, i, rows);
                S potentials[ROWS];
                for (long r = 0; r < ROWS; ++r) potentials[r] = S(F[std::min(i + r, of.n - 1)]);
                Vec<S, L> s[ROWS], mass[ROWS] = {};
                for (long j = 0; j < of.width; j += L) {
                    sums_over_coordinates<S, L, PRODUCTS>(of, rows, y + j, s);
                    const Vec<S, L> offset = load<S, L>(offsets + j);
                    for (int r = 0; r < ROWS; ++r) {
                        const Vec<S, L> e = potentials[r] + offset + (PRODUCTS ? s[r] : -of.scale * outer(s[r], of.q));
                        const Vec<K, L> part = exponential_of<K, L>(__builtin_convertvector(e, Vec<K, L>));
                        Vec<S, L> p = __builtin_convertvector(part, Vec<S, L>);
                        mass[r] += p;
                        if (!PRODUCTS) p *= of.scale * outer_slope(s[r], of.q);
                        store<S, L>(&shares[r][j], p);
                    }
                }
                for (long r = 0; r < height; ++r) masses[i + r] += sum_of<S, L>(mass[r]);
                for (long k = 0; k < of.d; ++k, y += of.width) {
                    Vec<S, L> found[ROWS] = {};
                    for (long j = 0; j < of.width; j += L) {
                        const Vec<S, L> yk = load<S, L>(y + j);
                        for (int r = 0; r < ROWS; ++r) {
                            const Vec<S, L> share = load<S, L>(&shares[r][j]);
                            found[r] += share * (PRODUCTS ? yk : term_slope(rows[r][k] - yk, of.q));
                        }
                    }
                    for (long r = 0; r < height; ++r) gradients[(i + r) * of.d + k] += sum_of<S, L>(found[r]);
                }
            }
    // The rows are 2 scale x_i here.
    for (long i = 0; PRODUCTS && i < of.n; ++i)
        for (long k = 0; k < of.d; ++k) {
            double& found = gradients[i * of.d + k];
            found = of.x[i * of.d + k] * masses[i] - 2 * of.scale * found;
        }
}

}  // namespace

#define EXPORT(name, S, K)                                                                                              \
    extern "C" void pass_##name(const S* x, long n, long d, const S* y, long tiles, long width, const S* offsets,       \
                                double scale, double q, long group, const double* own, double share, double* F,         \
                                const double* a, double* columns) {                                                     \
        pass<S, K, false>({x, y, offsets, n, d, tiles, width, S(scale), S(q)}, group, own, share, F, a, columns);       \
    }                                                                                                                   \
    extern "C" void pull_##name(const S* x, long n, long d, const S* y, long tiles, long width, const S* offsets,       \
                                double scale, double q, long group, const double* F, double* gradients,                 \
                                double* masses) {                                                                       \
        pull<S, K, false>({x, y, offsets, n, d, tiles, width, S(scale), S(q)}, group, F, gradients, masses);            \
    }
EXPORT(float_float, float, float)
EXPORT(double_float, double, float)
EXPORT(double_double, double, double)

// Squared distances as products: x holds 2 scale x_i, the offsets have the columns' squares, and own or F the rows'.
extern "C" void pass_products(const float* x, long n, long d, const float* y, long tiles, long width,
                              const float* offsets, double scale, double q, long group, const double* own, double share,
                              double* F, const double* a, double* columns) {
    pass<float, float, true>({x, y, offsets, n, d, tiles, width, float(scale), float(q)}, group, own, share, F, a, columns);
}
extern "C" void pull_products(const float* x, long n, long d, const float* y, long tiles, long width,
                              const float* offsets, double scale, double q, long group, const double* F,
                              double* gradients, double* masses) {
    pull<float, float, true>({x, y, offsets, n, d, tiles, width, float(scale), float(q)}, group, F, gradients, masses);
}

// A problem whose matrices are in memory, in two calls: its costs, and from them potentials, value and gradients.
//
// The iteration is that of anderson.py and iterate.py, the starts are those of warm_start.py, and the names are theirs; a
// problem whose exponents the format does not bear is left to them. Coordinates are in the type S, matrices in M,
// potentials and sums over rows in double. Columns are filled up to whole vectors, at an infinite cost and without weight.

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>
#include <vector>

#include "newton.h"

namespace {

// Numbers of gradients that all threads together have.
constexpr long MOST_NUMBERS = 1 << 24;

// What costs and gradients are made of.
template <class S> struct Samples {
    const S* x;            // (n, d)
    long n, d, m, padded;  // rows, coordinates, columns, columns filled up
    S scale, q;
    long threads;
    std::vector<S> y;  // (d, padded)

    Samples(const S* x, long n, long d, const S* columns, long m, long padded, double scale, double q, long threads)
        : x(x), n(n), d(d), m(m), padded(padded), scale(S(scale)), q(S(q)), threads(threads), y(d * padded) {
        // What is filled up is the first column, whose costs change no range.
        for (long j = 0; j < padded; ++j)
            for (long k = 0; k < d; ++k) y[k * padded + j] = columns[(j < m ? j : 0) * d + k];
    }

    // The last rows of all are repeated where there are less than ROWS.
    void rows_from(long first, const S** rows) const {
        for (long r = 0; r < ROWS; ++r) rows[r] = x + std::min(first + r, n - 1) * d;
    }

    void sums(const S* const* rows, long j, Vec<S, WIDTH<S>>* s) const {
        for (long r = 0; r < ROWS; ++r) s[r] = Vec<S, WIDTH<S>>{};
        for (long k = 0; k < d; ++k) {
            const Vec<S, WIDTH<S>> yk = load<S, WIDTH<S>>(&y[k * padded + j]);
            for (long r = 0; r < ROWS; ++r) s[r] += term(rows[r][k] - yk, q);
        }
    }
};

// Writes (n, padded) costs; told are the least, the largest and the mean, which is
// not a number where one of them is none.
template <class S, class M>
void costs(const Samples<S>& of, const double* a, const double* weights, M* C, double* told) {
    constexpr long L = WIDTH<S>;
    // In units of uniform weights, which a float bears for any number of columns.
    std::vector<S> b(of.padded);
    for (long j = 0; j < of.m; ++j) b[j] = S(weights[j] * double(of.m));
    std::vector<double> least(of.threads, INF), largest(of.threads, -INF), means(of.threads);
    in_parts(of.n, of.threads, [&](long part, long first, long last) {
        double mean = 0;
        Vec<S, L> low = all<S, L>(S(INF)), high = all<S, L>(S(-INF));
        const S* rows[ROWS];
        for (long i = first; i < last; i += ROWS) {
            const long height = std::min(ROWS, last - i);
            of.rows_from(i, rows);
            double sums[ROWS] = {};
            for (long begin = 0; begin < of.padded; begin += TERMS * L) {
                Vec<S, L> found[ROWS] = {};
                for (long j = begin; j < std::min(of.padded, begin + TERMS * L); j += L) {
                    Vec<S, L> s[ROWS];
                    of.sums(rows, j, s);
                    const Vec<S, L> weight = load<S, L>(&b[j]);
                    for (long r = 0; r < ROWS; ++r) {
                        const Vec<S, L> c = of.scale * outer(s[r], of.q);
                        low = c < low ? c : low;
                        high = c > high ? c : high;
                        found[r] += weight * c;
                        if (r < height) store<M, L>(C + (i + r) * of.padded + j, __builtin_convertvector(c, Vec<M, L>));
                    }
                }
                for (long r = 0; r < ROWS; ++r) sums[r] += sum_of<S, L>(found[r]);
            }
            for (long r = 0; r < height; ++r) {
                mean += a[i + r] * sums[r];
                std::fill(C + (i + r) * of.padded + of.m, C + (i + r + 1) * of.padded, M(INF));
            }
        }
        least[part] = -largest_of<S, L>(-low), largest[part] = largest_of<S, L>(high), means[part] = mean / double(of.m);
    });
    told[0] = *std::min_element(least.begin(), least.end());
    told[1] = *std::max_element(largest.begin(), largest.end());
    told[2] = std::accumulate(means.begin(), means.end(), 0.0);
}

template <class M> struct Matrices {
    const M* C;
    M* K;
    long n, m, padded, threads;
    std::vector<double> a, b;  // normalized, b filled up
    double epsilon, largest;

    Kernel<M> kernel(double warmer = 1, bool symmetric = false) const {
        const bool steep = largest > STEEP * epsilon * warmer;
        return Kernel<M>(C, K, n, m, padded, a.data(), b.data(), epsilon * warmer, symmetric, steep, threads);
    }

    // First potentials of rows and columns.
    void start(std::vector<double>& F, std::vector<double>& G) {
        if (largest < FLAT * epsilon) return;
        if (std::min(n, m) <= COARSEST)
            anneal(F, G);
        else
            from_fewer(F, G);
    }

    void anneal(std::vector<double>& F, std::vector<double>& G) {
        int stages = 1;
        while (epsilon * std::pow(4.0, stages) < largest / 256) ++stages;
        for (int k = stages; k > 0; --k) {
            Kernel<M> warm = kernel(std::pow(4.0, k));
            if (k == stages)
                warm.restart(G.data());
            else
                warm.absorb(F.data(), G.data());
            warm.iterate(G.data(), 0.1, 8, -1);
            // Potentials scale with 1 / epsilon in units of epsilon.
            for (long i = 0; i < n; ++i) F[i] = 4 * warm.F[i];
            for (long j = 0; j < m; ++j) G[j] *= 4;
        }
    }

    void from_fewer(std::vector<double>& F, std::vector<double>& G) {
        constexpr long L = WIDTH<M>;
        const long rows = (n + STRIDE - 1) / STRIDE, columns = (m + STRIDE - 1) / STRIDE, wide = (columns + L - 1) / L * L;
        std::vector<M> fewer(rows * wide, M(INF)), of_fewer(rows * wide);
        for (long i = 0; i < rows; ++i)
            for (long j = 0; j < columns; ++j) fewer[i * wide + j] = C[i * STRIDE * padded + j * STRIDE];
        Matrices few{fewer.data(), of_fewer.data(), rows, columns, wide, threads, std::vector<double>(rows),
                     std::vector<double>(wide), epsilon, largest};
        double sums[2] = {0, 0};
        for (long i = 0; i < rows; ++i) sums[0] += few.a[i] = a[i * STRIDE];
        for (long j = 0; j < columns; ++j) sums[1] += few.b[j] = b[j * STRIDE];
        if (!(sums[0] > 0 && sums[1] > 0)) return;
        for (double& weight : few.a) weight /= sums[0];
        for (double& weight : few.b) weight /= sums[1];
        std::vector<double> f(rows), g(wide);
        few.start(f, g);
        Kernel<M> kernel = few.kernel();
        kernel.absorb(f.data(), g.data());
        kernel.iterate(g.data(), 0.02, 60, -1);
        // Each answers the fewer of the other side.
        const M inverse = M(1 / epsilon);
        std::vector<M> narrow(wide), top(padded, M(-INF)), own(rows);
        for (long j = 0; j < columns; ++j) g[j] += std::log(few.b[j]);
        std::copy(g.begin(), g.begin() + columns, narrow.begin());
        in_parts(n, threads, [&](long, long first, long last) {
            std::vector<M> exponents(wide, M(INF));
            for (long i = first; i < last; ++i) {
                for (long j = 0; j < columns; ++j) exponents[j] = C[i * padded + j * STRIDE];
                Vec<M, L> top = all<M, L>(M(-INF)), sum = {};
                for (long j = 0; j < wide; j += L) {
                    const Vec<M, L> e = load<M, L>(&narrow[j]) - load<M, L>(&exponents[j]) * inverse;
                    store<M, L>(&exponents[j], e);
                    top = e > top ? e : top;
                }
                const M most = largest_of<M, L>(top);
                for (long j = 0; j < wide; j += L) sum += exponential_of<M, L>(load<M, L>(&exponents[j]) - most);
                std::fill(exponents.begin() + columns, exponents.end(), M(INF));
                F[i] = -double(most) - std::log(double(sum_of<M, L>(sum)));
            }
        });
        for (long i = 0; i < rows; ++i) own[i] = M(kernel.F[i] + std::log(few.a[i]));
        for (long i = 0; i < rows; ++i)
            for (long j = 0; j < padded; j += L) {
                const Vec<M, L> e = own[i] - load<M, L>(C + i * STRIDE * padded + j) * inverse, known = load<M, L>(&top[j]);
                store<M, L>(&top[j], e > known ? e : known);
            }
        std::vector<M> total(padded);
        std::fill(top.begin() + m, top.end(), M(0));
        for (long i = 0; i < rows; ++i)
            for (long j = 0; j < padded; j += L) {
                const Vec<M, L> e = own[i] - load<M, L>(C + i * STRIDE * padded + j) * inverse - load<M, L>(&top[j]);
                store<M, L>(&total[j], load<M, L>(&total[j]) + exponential_of<M, L>(e));
            }
        for (long j = 0; j < m; ++j) G[j] = -double(top[j]) - std::log(double(total[j]));
    }
};

// The pulls of some rows on their points, and on the columns' where asked for.
template <class S, class M>
void pull(const Samples<S>& of, const Kernel<M>& kernel, const M* K, long first, long last, double* gx, double* columns) {
    constexpr long L = WIDTH<S>;
    const S* rows[ROWS];
    std::vector<S> shares(ROWS * of.padded), narrow(columns ? of.d * of.padded : 0);
    for (long i = first; i < last; i += ROWS) {
        const long height = std::min(ROWS, last - i);
        of.rows_from(i, rows);
        S weights[ROWS] = {};
        const M* plan[ROWS];
        for (long r = 0; r < ROWS; ++r) plan[r] = K + std::min(i + r, of.n - 1) * of.padded;
        for (long r = 0; r < height; ++r) weights[r] = S(kernel.w[i + r]) * of.scale;
        for (long j = 0; j < of.padded; j += L) {
            Vec<S, L> s[ROWS];
            of.sums(rows, j, s);
            const Vec<S, L> v = __builtin_convertvector((load<M, L>(&kernel.v[j])), Vec<S, L>);
            for (long r = 0; r < ROWS; ++r) {
                const Vec<S, L> mass = __builtin_convertvector((load<M, L>(plan[r] + j)), Vec<S, L>) * v * weights[r];
                // Nothing of what has no mass, whatever its slope.
                store<S, L>(&shares[r * of.padded + j], mass > 0 ? mass * outer_slope(s[r], of.q) : Vec<S, L>{});
            }
        }
        for (long k = 0; k < of.d; ++k) {
            Vec<S, L> found[ROWS] = {};
            for (long j = 0; j < of.padded; j += L) {
                const Vec<S, L> yk = load<S, L>(&of.y[k * of.padded + j]);
                Vec<S, L> together = {};
                for (long r = 0; r < ROWS; ++r) {
                    const Vec<S, L> pull = load<S, L>(&shares[r * of.padded + j]) * term_slope(rows[r][k] - yk, of.q);
                    found[r] += pull;
                    together += pull;
                }
                if (columns) {
                    S* column = &narrow[k * of.padded + j];
                    store<S, L>(column, load<S, L>(column) - together);
                }
            }
            for (long r = 0; gx && r < height; ++r) gx[(i + r) * of.d + k] = sum_of<S, L>(found[r]);
        }
        // Sums over some rows, which go on in double.
        if ((i / ROWS + 1) % (TERMS / ROWS) == 0 || i + ROWS >= last)
            for (size_t j = 0; j < narrow.size(); ++j) columns[j] += narrow[j], narrow[j] = 0;
    }
}

// The gradients of what the last sweep's plan w K v pays, in the points where needed. The rows' gradient is that of a
// plan whose rows are exact, the columns' of one whose columns are.
template <class S, class M>
void gradients(const Samples<S>& of, const Kernel<M>& kernel, const M* K, bool symmetric, double* gx, double* gy) {
    // Each thread has columns of its own.
    const long height = of.d * of.padded, threads = std::max(1L, std::min(of.threads, MOST_NUMBERS / height));
    std::vector<double> columns(gy && !symmetric ? threads * height : 0);
    in_parts(of.n, threads, [&](long part, long first, long last) {
        pull<S, M>(of, kernel, K, first, last, gx, columns.empty() ? nullptr : &columns[part * height]);
    });
    for (long k = 1; k < threads && !columns.empty(); ++k)
        for (long j = 0; j < height; ++j) columns[j] += columns[k * height + j];
    if (symmetric)
        for (long i = 0; gx && i < of.n; ++i)
            for (long k = 0; k < of.d; ++k) gx[i * of.d + k] *= std::exp(kernel.residual[i]);
    for (long j = 0; !columns.empty() && j < of.m; ++j) {
        const double factor = std::exp(kernel.residual[j]);
        for (long k = 0; k < of.d; ++k) gy[j * of.d + k] = columns[k * of.padded + j] * factor;
    }
}

// What the rows pay for the columns of their own numbers, of which there are as many, and its gradient in the rows' points;
// the columns' is the opposite.
template <class S> double paid(const Samples<S>& of, const double* a, double* gradient) {
    constexpr long L = WIDTH<S>;
    double sum = 0;
    for (long i = 0; i < of.n; i += L) {
        const long height = std::min(L, of.n - i);
        const auto difference = [&](long k) {
            Vec<S, L> z = {};
            for (long l = 0; l < height; ++l) z[l] = of.x[(i + l) * of.d + k] - of.y[k * of.padded + i + l];
            return z;
        };
        Vec<S, L> s = {};
        for (long k = 0; k < of.d; ++k) s += term(difference(k), of.q);
        const Vec<S, L> cost = of.scale * outer(s, of.q), slope = of.scale * outer_slope(s, of.q);
        for (long l = 0; l < height; ++l) sum += a[i + l] * double(cost[l]);
        for (long k = 0; gradient && k < of.d; ++k) {
            const Vec<S, L> part = slope * term_slope(difference(k), of.q);
            for (long l = 0; l < height; ++l) gradient[(i + l) * of.d + k] = a[i + l] * double(part[l]);
        }
    }
    return sum;
}

// Weights, uniform ones where none are given.
struct Weights {
    std::vector<double> uniform;
    const double* numbers;

    Weights(const double* given, long count)
        : uniform(given ? 0 : count, 1.0 / count), numbers(given ? given : uniform.data()) {}
};

// told are the value, the marginal error, and whether that is small enough; returns the sweeps, negative where no format
// bears the exponents, or there is no memory.
template <class S, class M>
long solve(const Samples<S>& of, const double* a, const double* b, const M* C, M* K, double epsilon, double largest,
           bool symmetric, double tolerance, long most, double* f, double* g, double* gx, double* gy, double* told) {
    Matrices<M> all{C, K, of.n, of.m, of.padded, of.threads, std::vector<double>(a, a + of.n), std::vector<double>(of.padded),
                    epsilon, largest};
    std::copy(b, b + of.m, all.b.begin());
    std::vector<double> F(of.n), G(of.padded);
    if (!symmetric) all.start(F, G);
    Kernel<M> kernel = all.kernel(1, symmetric);
    kernel.absorb(F.data(), G.data());
    const Found found = kernel.iterate_to_end(G, tolerance, most, largest / epsilon);
    if (found.status == LOST) return -found.iterations;
    double value = 0, mass = 0;
    for (long i = 0; i < of.n; ++i) value += a[i] * (f[i] = kernel.F[i] * epsilon);
    for (long j = 0; j < of.m; ++j) value += b[j] * (g[j] = G[j] * epsilon);
    if (symmetric) {
        for (long i = 0; i < of.n; ++i) mass += double(kernel.w[i]) * double(kernel.s[i]);
        value -= epsilon * (mass - 1);
    }
    told[0] = value, told[1] = found.error, told[2] = found.status == SOLVED;
    if (gx || gy) gradients(of, kernel, K, symmetric, gx, gy);
    return found.iterations;
}

}  // namespace

#define SAMPLES(S)                                                                                                      \
    const S *x, long n, long d, const S *y, long m, long padded, double scale, double q, long threads, const double *a, \
        const double *b
#define EXPORT(name, S, M)                                                                                              \
    extern "C" void costs_##name(SAMPLES(S), M* C, double* told) {                                                      \
        try {                                                                                                           \
            const Samples<S> of(x, n, d, y, m, padded, scale, q, threads);                                              \
            costs<S, M>(of, Weights(a, n).numbers, Weights(b, m).numbers, C, told);                                     \
        } catch (const std::bad_alloc&) {                                                                               \
            told[2] = NAN;                                                                                              \
        }                                                                                                               \
    }                                                                                                                   \
    extern "C" long solve_##name(SAMPLES(S), const M* C, M* K, double epsilon, double largest, long symmetric,          \
                                 double tolerance, long most, double* f, double* g, double* gx, double* gy,             \
                                 double* told) {                                                                        \
        try {                                                                                                           \
            const Samples<S> of(x, n, d, y, m, padded, scale, q, threads);                                              \
            return solve<S, M>(of, Weights(a, n).numbers, Weights(b, m).numbers, C, K, epsilon, largest,                \
                               symmetric != 0, tolerance, most, f, g, gx, gy, told);                                    \
        } catch (const std::bad_alloc&) {                                                                               \
            return -1;                                                                                                  \
        }                                                                                                               \
    }                                                                                                                   \
    extern "C" double paid_##name(SAMPLES(S), double* gradient) {                                                       \
        try {                                                                                                           \
            (void)b;                                                                                                    \
            return paid<S>(Samples<S>(x, n, d, y, m, padded, scale, q, threads), Weights(a, n).numbers, gradient);      \
        } catch (const std::bad_alloc&) {                                                                               \
            return NAN;                                                                                                 \
        }                                                                                                               \
    }
// What is plain is compared in the samples' own format, what is not in double.
#if PLAIN
EXPORT(float, float, float)
#else
EXPORT(float, double, float)
#endif
EXPORT(double, double, double)

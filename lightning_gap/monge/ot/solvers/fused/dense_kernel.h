// A kernel matrix around absorbed potentials, its sweeps and their iteration, as in dense.py, anderson.py and iterate.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "anderson.h"

namespace {

// Costs of so many epsilons are rounded to a thousandth of one.
constexpr double STEEP = 1e3;

enum Status { SOLVED, UNSOLVED, LOST };

struct Found {
    long iterations;
    double error;
    Status status;
};

// A plan without its smallest entries, by rows.
struct Sparse {
    std::vector<long> first;
    std::vector<int> column;
    std::vector<double> mass;
};

// exp(F0 + G0 - C / epsilon) in memory, formed once around absorbed potentials.
template <class M> class Kernel {
    static constexpr long L = WIDTH<M>;
    const M* C;
    M* K;
    const double *a, *b;
    double epsilon;
    bool symmetric, steep;
    std::vector<double> F0, G0, sums, scales, some;  // the last by threads, as the next
    std::vector<M> partial;

  public:
    const long n, m, padded, threads;
    std::vector<M> v, w, s;
    std::vector<double> F, residual;  // of the last sweep

    Kernel(const M* C, M* K, long n, long m, long padded, const double* a, const double* b, double epsilon, bool symmetric,
           bool steep, long threads)
        : C(C), K(K), a(a), b(b), epsilon(epsilon), symmetric(symmetric), steep(steep), F0(n), G0(padded), sums(padded),
          scales(padded), some(threads * padded), partial(threads * padded), n(n), m(m), padded(padded), threads(threads),
          v(padded), w(n), s(n), F(n), residual(padded) {}

    void absorb(const double* rows, const double* columns) {
        std::copy(rows, rows + n, F0.begin());
        std::copy(columns, columns + m, G0.begin());
        if (steep)
            exponentials<double>();
        else
            exponentials<M>();
    }

    // In the type E: many epsilons' exponents, rounded another way each time, would be another problem's each time.
    template <class E> void exponentials() {
        constexpr long W = WIDTH<E>;
        const std::vector<E> columns(G0.begin(), G0.end());
        const E inverse = E(1 / epsilon);
        in_parts(n, threads, [&](long, long first, long last) {
            for (long i = first; i < last; ++i) {
                const E own = E(F0[i]);
                for (long j = 0; j < padded; j += W) {
                    const Vec<E, W> cost = __builtin_convertvector((load<M, W>(C + i * padded + j)), Vec<E, W>);
                    const Vec<E, W> e = load<E, W>(&columns[j]) - cost * inverse + own;
                    store<M, W>(K + i * padded + j, exponential_of<M, W>(__builtin_convertvector(e, Vec<M, W>)));
                }
            }
        });
    }

    // Around hard c-transforms, so that no row is without a 1, nor a column where their potentials may change for it.
    void restart(double* G, bool columns = true) {
        const M inverse = M(1 / epsilon);
        std::vector<M> narrow(padded), lowest(threads * padded, M(INF));
        std::copy(G, G + m, narrow.begin());
        std::vector<double> rows(n);
        in_parts(n, threads, [&](long part, long first, long last) {
            M* low = &lowest[part * padded];
            for (long i = first; i < last; ++i) {
                const M* costs = C + i * padded;
                Vec<M, L> top = all<M, L>(M(INF));
                for (long j = 0; j < padded; j += L) {
                    const Vec<M, L> e = load<M, L>(costs + j) * inverse - load<M, L>(&narrow[j]);
                    top = e < top ? e : top;
                }
                const M least = -largest_of<M, L>(-top);
                rows[i] = least;
                for (long j = 0; columns && j < padded; j += L) {
                    const Vec<M, L> e = load<M, L>(costs + j) * inverse - load<M, L>(&narrow[j]) - least;
                    const Vec<M, L> known = load<M, L>(low + j);
                    store<M, L>(low + j, e < known ? e : known);
                }
            }
        });
        for (long k = 1; k < threads; ++k)
            for (long j = 0; j < m; ++j) lowest[j] = std::min(lowest[j], lowest[k * padded + j]);
        for (long j = 0; columns && j < m; ++j) G[j] += lowest[j];
        absorb(rows.data(), G);
    }

    // Rows' sums and weights, and what they add up to in the columns.
    void answer_rows(long part, long first, long last) {
        M* narrow = &partial[part * padded];
        double* wide = &some[part * padded];
        const M* rows[ROWS];
        for (long i = first; i < last; i += ROWS) {
            Vec<M, L> found[ROWS] = {};
            M weight[ROWS] = {};
            for (long r = 0; r < ROWS; ++r) rows[r] = K + std::min(i + r, n - 1) * padded;
            for (long j = 0; j < padded; j += L) {
                const Vec<M, L> column = load<M, L>(&v[j]);
                for (long r = 0; r < ROWS; ++r) found[r] += load<M, L>(rows[r] + j) * column;
            }
            for (long r = 0; r < std::min(ROWS, last - i); ++r) {
                s[i + r] = sum_of<M, L>(found[r]);
                w[i + r] = weight[r] = symmetric ? v[i + r] : M(a[i + r] / s[i + r]);
            }
            if (symmetric) continue;
            for (long j = 0; j < padded; j += L) {
                Vec<M, L> column = load<M, L>(narrow + j);
                for (long r = 0; r < ROWS; ++r) column += weight[r] * load<M, L>(rows[r] + j);
                store<M, L>(narrow + j, column);
            }
            if ((i / ROWS + 1) % (TERMS / ROWS) == 0 || i + ROWS >= last)
                for (long j = 0; j < padded; ++j) wide[j] += narrow[j], narrow[j] = 0;
        }
    }

    // Answers the columns' potentials; returns the marginal error, infinite where the format does not bear them.
    double sweep(const double* G) {
        for (long j = 0; j < padded; j += DOUBLES) {
            const Vec<double, DOUBLES> scale =
                exponential_of<double, DOUBLES>(load<double, DOUBLES>(G + j) - load<double, DOUBLES>(&G0[j]));
            store<double, DOUBLES>(&scales[j], scale);
            store<M, DOUBLES>(&v[j], __builtin_convertvector(scale * load<double, DOUBLES>(b + j), Vec<M, DOUBLES>));
        }
        std::fill(some.begin(), some.end(), 0.0);
        std::fill(partial.begin(), partial.end(), M(0));
        in_parts(n, threads, [&](long part, long first, long last) { answer_rows(part, first, last); });
        std::fill(sums.begin(), sums.end(), 0.0);
        for (long k = 0; !symmetric && k < threads; ++k)
            for (long j = 0; j < m; ++j) sums[j] += some[k * padded + j];
        if (symmetric) std::copy(s.begin(), s.end(), sums.begin());
        double error = 0;
        bool normal = true;
        for (long j = 0; j < m; ++j) {
            const double share = sums[j] *= scales[j];
            normal &= share > 1e-300 && share < 1e300;
            error += b[j] * std::abs(share - 1);
        }
        for (long j = 0; j < padded; j += DOUBLES)
            store<double, DOUBLES>(&residual[j], -logarithm_of<double, DOUBLES>(load<double, DOUBLES>(&sums[j])));
        std::fill(residual.begin() + m, residual.end(), 0.0);
        return normal && error < INF ? error : INF;
    }

    // Writes the rows' answers of the last sweep.
    void answer(const double* G) {
        for (long i = 0; i < n; ++i) F[i] = symmetric ? G[i] : F0[i] - std::log(double(s[i]));
    }

    // Forms the kernel anew around potentials that have drifted.
    void settle(const double* G) {
        bool near = true;
        for (long j = 0; j < m; ++j) near &= std::abs(G[j] - G0[j]) < DRIFT;
        if (near) return;
        answer(G);
        const std::vector<double> rows = F;
        absorb(rows.data(), G);
    }

    // Sweeps until the marginal error is small enough; G begins and ends there, F is its answer.
    Found iterate(double* G, double tolerance, long most, long patience) {
        const double relaxation = symmetric ? 0.5 : 1.0;
        Anderson<M> anderson(m, padded);
        std::vector<double> safe(G, G + padded), image(padded), weighted(padded), root(padded);
        for (long j = 0; j < m; ++j) root[j] = std::sqrt(b[j]);
        double best = INF;
        for (long count = 1, restarted = -1;; ++count) {
            const double error = sweep(G);
            const bool solved = error <= tolerance;
            const bool ended = count >= most || (count == patience && error > STUCK) || count == SLOW * patience;
            if (solved || (ended && error < INF)) {
                answer(G);
                return {count, error, solved ? SOLVED : UNSOLVED};
            }
            bool astray = false;
            if (error == INF) {
                if (count == restarted + 1) return {count, error, LOST};
                image = safe;
                restart(image.data());
                restarted = count;
                astray = true;
            } else if (!(error <= 4 * best) && anderson.length) {
                image = safe;  // the extrapolation led astray: back to where plain Sinkhorn would have gone
                astray = true;
            } else {
                best = std::min(best, error);
                for (long j = 0; j < m; ++j) image[j] = G[j] + relaxation * residual[j];
            }
            if (astray) {
                best = INF;
                anderson.forget();
            }
            if (error < INF && (count < 4 || count % 4 == 0)) settle(image.data());
            safe = image;
            if (symmetric && count < PLAIN_SWEEPS) {
                std::copy(image.begin(), image.end(), G);
                continue;
            }
            for (long j = 0; j < m; ++j) weighted[j] = astray ? 0 : residual[j] * root[j];
            anderson.extrapolate(image.data(), weighted.data(), G);
        }
    }

    // Goes far along the last residuals, as far as the dual value rises: clusters far apart whose masses differ a little
    // are left with residuals that are constant on each.
    void leap(std::vector<double>& G) {
        sweep(G.data());
        const std::vector<double> from = G, step = residual;
        double near = 0, far = 1;
        const auto go = [&](double share) {
            for (long j = 0; j < m; ++j) G[j] = from[j] + share * step[j];
            restart(G.data(), false);
        };
        bool widening = true;
        for (int k = 0; k < LEAP_SWEEPS; ++k) {
            const double middle = widening ? far : (near + far) / 2;
            go(middle);
            sweep(G.data());
            double slope = 0;
            for (long j = 0; j < m; ++j) slope -= b[j] * std::expm1(-residual[j]) * step[j];
            const bool rising = slope > 0;
            if (rising) near = middle;
            if (!rising) far = middle;
            if (rising && widening) far = 4 * middle;
            widening &= rising;
        }
        go(near);
    }

    // Of newton.h.
    double value(const double* G);
    Sparse plan() const;
    double newton_step(std::vector<double>& step) const;
    double recentered_sweep(std::vector<double>& G);
    Found newton(std::vector<double>& G, double tolerance, long most, double farthest);

    // Sweeps; where these go slowly a leap, then Newton's steps, and leaps again where neither moves.
    Found iterate_to_end(std::vector<double>& G, double tolerance, long most, double farthest) {
        long swept = 0;
        for (int leaps = 0;; ++leaps) {
            const long patience = symmetric || leaps == LEAPS ? -1 : PATIENCE;
            Found found = iterate(G.data(), tolerance, most - swept, patience);
            swept += found.iterations;
            // What a leap mends, clusters far apart, would cost Newton long searches.
            if (leaps > 0 && found.status == UNSOLVED && swept < most && patience > 0) {
                found = newton(G, tolerance, most - swept, farthest);
                swept += found.iterations;
            }
            found.iterations = swept;
            if (found.status != UNSOLVED || swept + 1 >= most || patience < 0) return found;
            leap(G);
        }
    }
};

}  // namespace

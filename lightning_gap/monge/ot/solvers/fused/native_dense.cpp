// A problem whose matrices fit into a cache, in two calls: its costs, and from them potentials, value and gradients.
//
// The iteration is that of anderson.py and iterate.py, the starts are those of warm_start.py, and the names are theirs; a
// problem whose exponents the format does not bear is left to them. Coordinates are in the type S, matrices in M,
// potentials and sums over rows in double. Columns are filled up to whole vectors, at an infinite cost and without weight.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "formula.h"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Rows that are taken together, and after how many of them sums over rows go on in double.
constexpr long ROWS = 4, TERMS = 64;
// Costs of so many epsilons are rounded to a thousandth of one.
constexpr double STEEP = 1e3;
// Newton's steps, of each the conjugate gradients' and the line search's; entries of a plan that are left out of its
// Hessian, as shares of a column; and what a step has to gain of what its slope promises.
constexpr int STEPS = 40, GRADIENTS = 100, HALVINGS = 24;
constexpr double LEFT_OUT = 1e-5, PROMISED = 1e-4;

template <class T> constexpr long WIDTH = VECTOR_BYTES / sizeof(T);

// Calls work(k, first, last) for the k-th part of some rows, each by a thread; parts end where sums go on in double.
template <class Work> void in_parts(long rows, long threads, const Work& work) {
    const long part = ((rows + threads - 1) / threads + TERMS - 1) / TERMS * TERMS;
    std::vector<std::thread> others;
    for (long k = 1; k < threads && k * part < rows; ++k)
        others.emplace_back([&work, k, part, rows] { work(k, k * part, std::min(rows, (k + 1) * part)); });
    work(0, 0, std::min(rows, part));
    for (std::thread& other : others) other.join();
}

// What costs and gradients are made of.
template <class S> struct Samples {
    const S* x;            // (n, d)
    long n, d, m, padded;  // rows, coordinates, columns, columns filled up
    S scale, q;
    long threads;
    std::vector<S> y;  // (d, padded)

    Samples(const S* x, long n, long d, const S* columns, long m, long padded, double scale, double q, long threads)
        : x(x), n(n), d(d), m(m), padded(padded), scale(S(scale)), q(S(q)), threads(threads), y(d * padded) {
        for (long j = 0; j < m; ++j)
            for (long k = 0; k < d; ++k) y[k * padded + j] = columns[j * d + k];
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
    std::vector<double> b(of.padded);
    std::copy(weights, weights + of.m, b.begin());
    constexpr long W = WIDTH<M>;
    std::vector<double> least(of.threads, INF), largest(of.threads, -INF), means(of.threads);
    in_parts(of.n, of.threads, [&](long part, long first, long last) {
        double mean = 0;
        Vec<M, W> low = all<M, W>(M(INF)), high = all<M, W>(M(-INF));
        const S* rows[ROWS];
        for (long i = first; i < last; i += ROWS) {
            const long height = std::min(ROWS, last - i);
            of.rows_from(i, rows);
            for (long j = 0; j < of.padded; j += L) {
                Vec<S, L> s[ROWS];
                of.sums(rows, j, s);
                for (long r = 0; r < height; ++r)
                    store<M, L>(C + (i + r) * of.padded + j,
                                __builtin_convertvector(of.scale * outer(s[r], of.q), Vec<M, L>));
            }
            for (long r = 0; r < height; ++r) {
                M* row = C + (i + r) * of.padded;
                std::fill(row + of.m, row + of.padded, row[0]);
                Vec<double, W> sum = {};
                for (long j = 0; j < of.padded; j += W) {
                    const Vec<M, W> c = load<M, W>(row + j);
                    low = c < low ? c : low;
                    high = c > high ? c : high;
                    sum += load<double, W>(&b[j]) * __builtin_convertvector(c, Vec<double, W>);
                }
                std::fill(row + of.m, row + of.padded, M(INF));
                mean += a[i + r] * sum_of<double, W>(sum);
            }
        }
        least[part] = -largest_of<M, W>(-low), largest[part] = largest_of<M, W>(high), means[part] = mean;
    });
    told[0] = *std::min_element(least.begin(), least.end());
    told[1] = *std::max_element(largest.begin(), largest.end());
    told[2] = std::accumulate(means.begin(), means.end(), 0.0);
}

// The last steps and residuals, and what they extrapolate to; on every other call, as good.
template <class M> class Anderson {
    static constexpr long L = WIDTH<M>, MOST = MEMORY;
    long m, padded, memory, calls = 0;
    bool begun = false, fresh = true;
    M regularization;
    std::vector<double> last;
    std::vector<M> steps, residuals, present;
    double gram[MOST][MOST] = {}, right[MOST] = {};

    static double dot(const M* left, const M* with, long count) {
        Vec<M, L> sum = {};
        for (long j = 0; j < count; j += L) sum += load<M, L>(left + j) * load<M, L>(with + j);
        return sum_of<M, L>(sum);
    }

  public:
    long length = 0;

    Anderson(long m, long padded)
        : m(m), padded(padded), memory(std::max(1L, std::min(MOST, m))),
          regularization(sizeof(M) == 4 ? REGULARIZATION_FLOAT : REGULARIZATION_DOUBLE), last(padded),
          steps(memory * padded), residuals(memory * padded), present(padded) {}

    void forget() {
        std::fill(steps.begin(), steps.end(), M(0));
        std::fill(residuals.begin(), residuals.end(), M(0));
        std::fill(present.begin(), present.end(), M(0));
        std::memset(gram, 0, sizeof gram);
        fresh = true;
        length = 0;
    }

    // Writes the next points, from the map's images and their residuals times roots of the weights.
    void extrapolate(const double* image, const double* residual, double* next) {
        std::copy(image, image + padded, next);
        if (!begun) {
            for (long j = 0; j < m; ++j) present[j] = M(residual[j]), last[j] = image[j];
            begun = true, fresh = false;
            return;
        }
        const long row = calls % memory;
        M *step = &steps[row * padded], *change = &residuals[row * padded];
        for (long j = 0; j < m; ++j) {
            step[j] = fresh ? M(0) : M(image[j] - last[j]);
            change[j] = fresh ? M(0) : M(residual[j]) - present[j];
            present[j] = M(residual[j]);
            last[j] = image[j];
        }
        length = fresh ? 0 : length + 1;
        fresh = false;
        ++calls;
        const long q = std::min(calls, memory);
        for (long k = 0; k < q; ++k) {
            gram[row][k] = gram[k][row] = dot(change, &residuals[k * padded], padded);
            right[k] = dot(&residuals[k * padded], present.data(), padded);
        }
        if (calls > 2 && calls % 2) return;
        double system[MOST][MOST + 1], weights[MOST], top = 0;
        for (long k = 0; k < q; ++k) top = std::max(top, gram[k][k]);
        for (long k = 0; k < q; ++k) {
            std::copy(gram[k], gram[k] + q, system[k]);
            system[k][k] += regularization * top + 1e-300;
            system[k][q] = right[k];
        }
        for (long k = 0; k < q; ++k) {
            long pivot = k;
            for (long l = k + 1; l < q; ++l)
                if (std::abs(system[l][k]) > std::abs(system[pivot][k])) pivot = l;
            if (!(std::abs(system[pivot][k]) > 0)) return;  // residuals of nothing but roundings
            if (pivot != k) std::swap_ranges(system[k], system[k] + q + 1, system[pivot]);
            for (long l = k + 1; l < q; ++l) {
                const double factor = system[l][k] / system[k][k];
                for (long c = k; c <= q; ++c) system[l][c] -= factor * system[k][c];
            }
        }
        for (long k = q - 1; k >= 0; --k) {
            double sum = system[k][q];
            for (long c = k + 1; c < q; ++c) sum -= system[k][c] * weights[c];
            weights[k] = sum / system[k][k];
        }
        std::vector<M> jump(padded);
        for (long k = 0; k < q; ++k) {
            const M weight = M(weights[k]);
            for (long j = 0; j < padded; ++j) jump[j] += weight * steps[k * padded + j];
        }
        M farthest = 0;
        bool known = true;
        for (long j = 0; j < m; ++j) {
            farthest = std::max(farthest, std::abs(jump[j]));
            known &= jump[j] == jump[j];
        }
        if (known && farthest < M(LONGEST_JUMP))
            for (long j = 0; j < m; ++j) next[j] = image[j] - jump[j];
    }
};

enum Status { SOLVED, UNSOLVED, LOST };

struct Found {
    long iterations;
    double error;
    Status status;
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
        : C(C), K(K), a(a), b(b), epsilon(epsilon), symmetric(symmetric), steep(steep), F0(n), G0(padded), sums(padded), scales(padded),
          some(threads * padded), partial(threads * padded), n(n), m(m), padded(padded), threads(threads), v(padded), w(n), s(n), F(n), residual(padded) {}

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
            const bool solved = error <= tolerance, ended = count >= most || (count == patience && error > STUCK) || count == 4 * patience;
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

    // The semi-dual's value after a sweep, in units of epsilon.
    double value(const double* G) {
        answer(G);
        double sum = 0;
        for (long i = 0; i < n; ++i) sum += a[i] * F[i];
        for (long j = 0; j < m; ++j) sum += b[j] * G[j];
        return sum;
    }

    // The last sweep's plan without its smallest entries, by rows.
    struct Sparse {
        std::vector<long> first;
        std::vector<int> column;
        std::vector<double> mass;
    };
    Sparse plan() const {
        Sparse kept;
        std::vector<M> least(padded, M(INF));
        for (long j = 0; j < m; ++j) least[j] = M(LEFT_OUT * b[j]);
        for (long i = 0; i < n; ++i) {
            kept.first.push_back(kept.mass.size());
            for (long j = 0; j < padded; j += L) {
                const Vec<M, L> mass = load<M, L>(K + i * padded + j) * load<M, L>(&v[j]) * w[i];
                const Ints<M, L> some = mass > load<M, L>(&least[j]);
                bool any = false;
                for (long l = 0; l < L; ++l) any |= some[l] != 0;
                for (long l = 0; any && l < L; ++l)
                    if (some[l]) kept.column.push_back(j + l), kept.mass.push_back(mass[l]);
            }
        }
        kept.first.push_back(kept.mass.size());
        return kept;
    }

    // Writes Newton's step on the semi-dual, (diag(c) - P' diag(1/a) P) step = b - c, by conjugate gradients with the
    // diagonal's inverse; c are the plan's columns. Returns the slope along it.
    double newton_step(std::vector<double>& step) const {
        const Sparse P = plan();
        std::vector<double> heavy(m), diagonal(m), slope(m), left(m), along(m), image(m);
        for (long j = 0; j < m; ++j) {
            heavy[j] = diagonal[j] = b[j] * sums[j];
            left[j] = slope[j] = b[j] - heavy[j];
            step[j] = 0;
        }
        for (long i = 0; i < n; ++i)
            for (long k = P.first[i]; k < P.first[i + 1]; ++k) diagonal[P.column[k]] -= P.mass[k] * P.mass[k] / a[i];
        for (long j = 0; j < m; ++j) diagonal[j] = std::max(diagonal[j], 1e-14 * heavy[j]) + 1e-300;
        double size = 0, goal = 0;
        for (long j = 0; j < m; ++j) {
            along[j] = left[j] / diagonal[j];
            size += left[j] * along[j];
        }
        goal = 1e-4 * size;
        for (int turn = 0; turn < GRADIENTS && size > goal; ++turn) {
            for (long j = 0; j < m; ++j) image[j] = heavy[j] * along[j];
            for (long i = 0; i < n; ++i) {
                double sum = 0;
                for (long k = P.first[i]; k < P.first[i + 1]; ++k) sum += P.mass[k] * along[P.column[k]];
                sum /= a[i];
                for (long k = P.first[i]; k < P.first[i + 1]; ++k) image[P.column[k]] -= P.mass[k] * sum;
            }
            double curvature = 0, next = 0;
            for (long j = 0; j < m; ++j) curvature += along[j] * image[j];
            if (!(curvature > 0)) break;
            const double length = size / curvature;
            for (long j = 0; j < m; ++j) {
                step[j] += length * along[j];
                left[j] -= length * image[j];
                next += left[j] * left[j] / diagonal[j];
            }
            for (long j = 0; j < m; ++j) along[j] = left[j] / diagonal[j] + next / size * along[j];
            size = next;
        }
        double rise = 0;
        for (long j = 0; j < m; ++j) rise += slope[j] * step[j];
        return rise;
    }

    // A sweep with the kernel formed anew where it is far from the potentials.
    double recentered_sweep(std::vector<double>& G) {
        double far = 0;
        for (long j = 0; j < m; ++j) far = std::max(far, std::abs(G[j] - G0[j]));
        if (!(far < DRIFT)) restart(G.data(), false);
        return sweep(G.data());
    }

    // Newton's steps, each with a line search and a sweep: where epsilon is small a plan has few entries, and a step costs
    // little more than the sweeps whose hundreds it stands for (Tang et al. 2024, "Accelerating Sinkhorn algorithm with
    // sparse Newton iterations").
    Found newton(std::vector<double>& G, double tolerance, long most, double farthest) {
        long swept = 1;
        restart(G.data(), false);
        double error = sweep(G.data()), height = value(G.data());
        std::vector<double> step(padded);
        for (int turn = 0; turn < STEPS && error < INF && !(error <= tolerance) && swept < most; ++turn) {
            const double rise = newton_step(step);
            if (!(rise > 0)) break;
            const std::vector<double> from = G;
            double share = 1, top = 0;
            for (long j = 0; j < m; ++j) top = std::max(top, std::abs(step[j]));
            if (top > farthest) share = farthest / top;
            bool better = false;
            for (int k = 0; k < HALVINGS && !better && swept < most; ++k, share *= 0.4) {
                for (long j = 0; j < m; ++j) G[j] = from[j] + share * step[j];
                const double found = recentered_sweep(G);
                ++swept;
                if (!(found < INF)) continue;
                const double gained = value(G.data()) - height, rounding = 1e-11 * (1 + std::abs(height));
                better = gained > std::max(PROMISED * share * rise, rounding) || (gained > -rounding && found < error);
                if (better) error = found, height += gained;
            }
            if (!better) {
                G = from;
                error = recentered_sweep(G);
                ++swept;
                break;
            }
            if (error <= tolerance) break;
            for (long j = 0; j < m; ++j) G[j] += residual[j];
            error = recentered_sweep(G);
            height = value(G.data());
            ++swept;
        }
        answer(G.data());
        return {swept, error, error <= tolerance ? SOLVED : error < INF ? UNSOLVED : LOST};
    }

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
            if (found.status != UNSOLVED || swept >= most || patience < 0) return found;
            if (found.error > STUCK) leap(G);
        }
    }
};

template <class M> struct Matrices {
    const M* C;
    M* K;
    long n, m, padded, threads;
    std::vector<double> a, b;  // normalized, b filled up
    double epsilon, largest;

    Kernel<M> kernel(double warmer = 1, bool symmetric = false) const {
        const bool steep = largest > STEEP * epsilon * warmer;
        return Kernel<M>(C, K, n, m, padded, a.data(), b.data(), epsilon * warmer, symmetric, steep,
                         threads);
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
    std::vector<S> shares(ROWS * of.padded);
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
                    double* column = &columns[k * of.padded + j];
                    store<double, L>(column, load<double, L>(column) - __builtin_convertvector(together, Vec<double, L>));
                }
            }
            for (long r = 0; gx && r < height; ++r) gx[(i + r) * of.d + k] = sum_of<S, L>(found[r]);
        }
    }
}

// The gradients of what the last sweep's plan w K v pays, in the points where needed. The rows' gradient is that of a
// plan whose rows are exact, the columns' of one whose columns are.
template <class S, class M>
void gradients(const Samples<S>& of, const Kernel<M>& kernel, const M* K, bool symmetric, double* gx, double* gy) {
    const long height = of.d * of.padded;
    std::vector<double> columns(gy && !symmetric ? of.threads * height : 0);
    in_parts(of.n, of.threads, [&](long part, long first, long last) {
        pull<S, M>(of, kernel, K, first, last, gx, columns.empty() ? nullptr : &columns[part * height]);
    });
    for (long k = 1; k < of.threads && !columns.empty(); ++k)
        for (long j = 0; j < height; ++j) columns[j] += columns[k * height + j];
    if (symmetric)
        for (long i = 0; gx && i < of.n; ++i)
            for (long k = 0; k < of.d; ++k) gx[i * of.d + k] *= std::exp(kernel.residual[i]);
    for (long j = 0; !columns.empty() && j < of.m; ++j) {
        const double factor = std::exp(kernel.residual[j]);
        for (long k = 0; k < of.d; ++k) gy[j * of.d + k] = columns[k * of.padded + j] * factor;
    }
}

struct Options {
    double tolerance;
    long most;
};

// told are the value, the marginal error, and whether that is small enough; returns the sweeps, negative where no format
// bears the exponents.
template <class S, class M>
long solve(const Samples<S>& of, const double* a, const double* b, const M* C, M* K, double epsilon, double largest,
           bool symmetric, Options options, double* f, double* g, double* gx, double* gy, double* told) {
    Matrices<M> all{C, K, of.n, of.m, of.padded, of.threads, std::vector<double>(a, a + of.n), std::vector<double>(of.padded),
                    epsilon, largest};
    std::copy(b, b + of.m, all.b.begin());
    std::vector<double> F(of.n), G(of.padded);
    if (!symmetric) all.start(F, G);
    Kernel<M> kernel = all.kernel(1, symmetric);
    kernel.absorb(F.data(), G.data());
    const Found found = kernel.iterate_to_end(G, options.tolerance, options.most, largest / epsilon);
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
        costs<S, M>(Samples<S>(x, n, d, y, m, padded, scale, q, threads), a, b, C, told);                               \
    }                                                                                                                   \
    extern "C" long solve_##name(SAMPLES(S), const M* C, M* K, double epsilon, double largest, long symmetric,          \
                                 double tolerance, long most, double* f, double* g, double* gx, double* gy,             \
                                 double* told) {                                                                        \
        return solve<S, M>(Samples<S>(x, n, d, y, m, padded, scale, q, threads), a, b, C, K, epsilon, largest,          \
                           symmetric != 0, {tolerance, most}, f, g, gx, gy, told);                                      \
    }
EXPORT(float_float, float, float)
EXPORT(double_float, double, float)
EXPORT(double_double, double, double)

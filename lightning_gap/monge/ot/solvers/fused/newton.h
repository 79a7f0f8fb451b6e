// Newton's steps on the semi-dual, for small epsilons (Tang et al. 2024, "Accelerating Sinkhorn algorithm with sparse
// Newton iterations").

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "dense_kernel.h"

namespace {

// Newton's steps, of each the conjugate gradients' and the line search's; entries of a plan that are left out of its
// Hessian, as shares of a column; and what a step has to gain of what its slope promises.
constexpr int STEPS = 40, GRADIENTS = 100, HALVINGS = 24;
constexpr double LEFT_OUT = 1e-5, PROMISED = 1e-4;

// The semi-dual's value after a sweep, in units of epsilon.
template <class M> double Kernel<M>::value(const double* G) {
    answer(G);
    double sum = 0;
    for (long i = 0; i < n; ++i) sum += a[i] * F[i];
    for (long j = 0; j < m; ++j) sum += b[j] * G[j];
    return sum;
}

// The last sweep's plan without its smallest entries.
template <class M> Sparse Kernel<M>::plan() const {
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
template <class M> double Kernel<M>::newton_step(std::vector<double>& step) const {
    const Sparse P = plan();
    // A plan that is not sparse is no longer one of a small epsilon, and sweeps do as well.
    if (long(P.mass.size()) > n * m / 8) return 0;
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
template <class M> double Kernel<M>::recentered_sweep(std::vector<double>& G) {
    double far = 0;
    for (long j = 0; j < m; ++j) far = std::max(far, std::abs(G[j] - G0[j]));
    if (!(far < DRIFT)) restart(G.data(), false);
    return sweep(G.data());
}

// Newton's steps, each with a line search and a sweep: where epsilon is small a plan has few entries, and a step costs
// little more than the sweeps whose hundreds it stands for (Tang et al. 2024, "Accelerating Sinkhorn algorithm with
// sparse Newton iterations").
template <class M> Found Kernel<M>::newton(std::vector<double>& G, double tolerance, long most, double farthest) {
    long swept = 1;
    restart(G.data(), false);
    double error = sweep(G.data()), height = value(G.data());
    std::vector<double> step(padded);
    for (int turn = 0; turn < STEPS && error < INF && !(error <= tolerance) && swept + 1 < most; ++turn) {
        const double rise = newton_step(step);
        if (!(rise > 0)) break;
        const std::vector<double> from = G;
        double share = 1, top = 0;
        for (long j = 0; j < m; ++j) top = std::max(top, std::abs(step[j]));
        if (top > farthest) share = farthest / top;
        bool better = false;
        for (int k = 0; k < HALVINGS && !better && swept + 1 < most; ++k, share *= 0.4) {
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

}  // namespace

// Anderson acceleration of one problem, as in anderson.py.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "row_parts.h"

namespace {

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

}  // namespace

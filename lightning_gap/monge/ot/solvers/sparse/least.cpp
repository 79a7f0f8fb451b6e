// The least costs of each row, less the columns' potentials, over all columns and without a matrix.
//
// A group of rows meets the columns tile by tile, and a tile ROWS rows at a time, as in soft_minimum.cpp: a tile's values are
// looked through only where the least of them is below what the row has kept.

#include "../fused/formula.h"

namespace {

constexpr long ROWS = 4, MOST_COLUMNS = 512, L = DOUBLES;
using Doubles = Vec<double, L>;

INLINE bool any_below(Doubles v, double bound) {
    const Ints<double, L> mask = v < bound;
    int64_t any = 0;
    for (long l = 0; l < L; ++l) any |= mask[l];
    return any != 0;
}

}  // namespace

// For each row up to `most` columns of least scale * OUTER(sum_k TERM(x_k - y_k)) + offset below the row's bound, ascending.
extern "C" void least(const double* x, long n, long d, const double* y, long tiles, long width, const double* offsets,
                      double scale, double q, long group, const double* bounds, long most, int* columns, double* values,
                      int64_t* counts) {
    alignas(VECTOR_BYTES) double buffer[ROWS][MOST_COLUMNS];
    for (long start = 0; start < n; start += group) {
        const long stop = std::min(n, start + group);
        std::fill(counts + start, counts + stop, 0);
        for (long t = 0; t < tiles; ++t)
            for (long i = start; i < stop; i += ROWS) {
                const double* rows[ROWS];
                for (long r = 0; r < ROWS; ++r) rows[r] = x + std::min(i + r, stop - 1) * d;
                Doubles lowest[ROWS], s[ROWS];
                for (int r = 0; r < ROWS; ++r) lowest[r] = all<double, L>(INFINITY);
                for (long j = 0; j < width; j += L) {
                    const double* coordinates = y + t * d * width + j;
                    for (int r = 0; r < ROWS; ++r) s[r] = Doubles{};
                    for (long k = 0; k < d; ++k, coordinates += width) {
                        const Doubles c = load<double, L>(coordinates);
                        for (int r = 0; r < ROWS; ++r) s[r] += term(rows[r][k] - c, q);
                    }
                    const Doubles offset = load<double, L>(offsets + t * width + j);
                    for (int r = 0; r < ROWS; ++r) {
                        const Doubles e = offset + scale * outer(s[r], q);
                        store<double, L>(&buffer[r][j], e);
                        lowest[r] = e < lowest[r] ? e : lowest[r];
                    }
                }
                for (long r = 0; r < std::min(ROWS, stop - i); ++r) {
                    int64_t count = counts[i + r];
                    double* found = values + (i + r) * most;
                    int* at = columns + (i + r) * most;
                    double bound = count == most ? found[most - 1] : bounds[i + r];
                    if (!any_below(lowest[r], bound)) continue;
                    for (long j = 0; j < width; j += L) {
                        if (!any_below(load<double, L>(&buffer[r][j]), bound)) continue;
                        for (long l = j; l < j + L; ++l) {
                            const double e = buffer[r][l];
                            if (!(e < bound)) continue;
                            long k = count < most ? count++ : most - 1;
                            for (; k > 0 && found[k - 1] > e; --k) found[k] = found[k - 1], at[k] = at[k - 1];
                            found[k] = e, at[k] = int(t * width + l);
                            if (count == most) bound = found[most - 1];
                        }
                    }
                    counts[i + r] = count;
                }
            }
    }
}

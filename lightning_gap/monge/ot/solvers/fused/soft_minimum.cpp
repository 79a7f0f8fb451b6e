// Passes over all pairs of samples: costs, exponentials, sums and gradients, without a matrix.
//
// A group of rows x meets the columns y tile by tile, and a tile ROWS rows at a time: the costs and exponents of these stay
// in the first cache, and what they add up to in registers. The columns lie tile by tile, and in a tile by coordinates, so
// that neighbours are taken as one vector; the last tile is filled up by columns of offset -1e30. Exponents are taken in
// the type S, exponentials in K, sums over tiles in double. Vectors are those of GCC and Clang, which make of them what
// the processor has.
//
// The cost is scale * OUTER(sum_k TERM(x_k - y_k)): the compiler is given both, and their slopes, as expressions in the
// difference z, the sum s, and a number q.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr long ROWS = 4, MOST_COLUMNS = 512;
#if defined(__AVX512F__)
constexpr long VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr long VECTOR_BYTES = 32;
#else
constexpr long VECTOR_BYTES = 16;
#endif
constexpr long FLOATS = VECTOR_BYTES / sizeof(float), DOUBLES = VECTOR_BYTES / sizeof(double);

template <class T> struct Format;
template <> struct Format<float> {
    typedef int32_t integer;
    static constexpr int mantissa = 23, exp_terms = 8, log_terms = 5, arc_terms = 11;
    static constexpr float shift = 12582912.0f, least = -87.0f, most = 88.0f;  // 1.5 * 2^23; where exp is a normal number
    static constexpr float ln2_high = 0.693145752f, ln2_low = 1.42860677e-6f;
    static constexpr int32_t sign = INT32_MIN, root_half = 0x3f3504f3;
};
template <> struct Format<double> {
    typedef int64_t integer;
    static constexpr int mantissa = 52, exp_terms = 14, log_terms = 11, arc_terms = 24;
    static constexpr double shift = 6755399441055744.0, least = -708.0, most = 709.0;  // 1.5 * 2^52
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    static constexpr int64_t sign = INT64_MIN, root_half = 0x3fe6a09e667f3bcd;
};
// LANES numbers of a type.
template <class T, long LANES> struct Lanes {
    typedef T vec __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
    typedef typename Format<T>::integer ints __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, long L> using Vec = typename Lanes<T, L>::vec;
template <class T, long L> using Ints = typename Lanes<T, L>::ints;

template <class T, long L> INLINE Vec<T, L> load(const T* p) { return *reinterpret_cast<const Vec<T, L>*>(p); }
template <class T, long L> INLINE void store(T* p, Vec<T, L> v) { *reinterpret_cast<Vec<T, L>*>(p) = v; }
template <class T, long L> INLINE Vec<T, L> all(T number) { return Vec<T, L>{} + number; }

template <class T, long L> INLINE T sum_of(Vec<T, L> v) {
    T sum = 0;
    for (int l = 0; l < L; ++l) sum += v[l];
    return sum;
}
template <class T, long L> INLINE T largest_of(Vec<T, L> v) {
    T most = v[0];
    for (int l = 1; l < L; ++l) most = std::max(most, v[l]);
    return most;
}
template <class T, long L> INLINE Vec<T, L> absolute_of(Vec<T, L> v) {
    return (Vec<T, L>)((Ints<T, L>)v & ~Format<T>::sign);
}
template <class T, long L> INLINE Vec<T, L> with_sign_of(Vec<T, L> v, Vec<T, L> z) {
    return z == 0 ? Vec<T, L>{} : (Vec<T, L>)((Ints<T, L>)v | ((Ints<T, L>)z & Format<T>::sign));
}
// Of floats by an approximate inverse and a step of Newton's, which is right to the last bit or two, and several times as
// fast where the processor takes one root after the other.
template <class T, long L> INLINE Vec<T, L> root_of(Vec<T, L> v) {
    Vec<T, L> r;
#if defined(__AVX__)
    if constexpr (std::is_same_v<T, float>) {
        const Vec<T, L> some = v > 1e-36f ? v : all<T, L>(1e-36f);
#if defined(__AVX512F__)
        const Vec<T, L> inverse = (Vec<T, L>)_mm512_rsqrt14_ps((__m512)some);
#else
        const Vec<T, L> inverse = (Vec<T, L>)_mm256_rsqrt_ps((__m256)some);
#endif
        r = v * inverse;
        return r + inverse * 0.5f * (v - r * r);
    }
#endif
    for (int l = 0; l < L; ++l) r[l] = std::sqrt(v[l]);
    return r;
}

// e^z = 2^n e^r with |r| <= ln 2 / 2, by the series of e^r; n is read from the last bits of a sum with a large number.
template <class T, long L> INLINE Vec<T, L> exponential_of(Vec<T, L> z) {
    const Vec<T, L> given = z;
    z = z > Format<T>::least ? z : all<T, L>(Format<T>::least);
    z = z < Format<T>::most ? z : all<T, L>(Format<T>::most);
    Vec<T, L> shifted = z * T(1.44269504088896340736) + Format<T>::shift, n = shifted - Format<T>::shift;
    Vec<T, L> r = z - n * Format<T>::ln2_high - n * Format<T>::ln2_low;
    constexpr T inverse[] = {T(1), T(1), T(1.) / 2, T(1.) / 6, T(1.) / 24, T(1.) / 120, T(1.) / 720, T(1.) / 5040,
                             T(1.) / 40320, T(1.) / 362880, T(1.) / 3628800, T(1.) / 39916800, T(1.) / 479001600,
                             T(1.) / 6227020800};
    Vec<T, L> p = all<T, L>(inverse[Format<T>::exp_terms - 1]);
#pragma GCC unroll 16
    for (int k = Format<T>::exp_terms - 2; k >= 0; --k) p = p * r + inverse[k];
    p = (Vec<T, L>)((Ints<T, L>)p + ((Ints<T, L>)shifted << Format<T>::mantissa));
    return given < Format<T>::least ? Vec<T, L>{} : p;
}

// v^q for v >= 0, by log v = e log 2 + 2 atanh((m - 1) / (m + 1)) with a mantissa m within a root of 2 of 1.
template <class T, long L> INLINE Vec<T, L> power_of(Vec<T, L> v, T q) {
    Ints<T, L> bits = (Ints<T, L>)v, e = (bits - Format<T>::root_half) >> Format<T>::mantissa;
    Vec<T, L> m = (Vec<T, L>)(bits - (e << Format<T>::mantissa)), u = (m - 1) / (m + 1), square = u * u;
    Vec<T, L> series = all<T, L>(T(1) / (2 * Format<T>::log_terms - 1));
#pragma GCC unroll 16
    for (int k = Format<T>::log_terms - 2; k >= 0; --k) series = series * square + T(1) / (2 * k + 1);
    Vec<T, L> log = 2 * u * series;
    log += __builtin_convertvector(e, Vec<T, L>) * T(0.693147180559945309417);
    return v > 0 ? exponential_of<T, L>(q * log) : all<T, L>(T(q == 0));
}

// arcsin v for v in [0, 1], by the series up to 1/2, and beyond as pi / 2 - 2 arcsin sqrt((1 - v) / 2).
template <class T, long L> INLINE Vec<T, L> arcsine_of(Vec<T, L> v) {
    v = v < 1 ? v : all<T, L>(1);
    const Vec<T, L> half = (1 - v) / 2, u = v > T(0.5) ? root_of<T, L>(half) : v, square = u * u;
    T coefficients[Format<T>::arc_terms] = {1};
#pragma GCC unroll 32
    for (int k = 1; k < Format<T>::arc_terms; ++k) coefficients[k] = coefficients[k - 1] * (2 * k - 1) / (2 * k);
    Vec<T, L> series = Vec<T, L>{};
#pragma GCC unroll 32
    for (int k = Format<T>::arc_terms - 1; k >= 0; --k) series = series * square + coefficients[k] / (2 * k + 1);
    return v > T(0.5) ? T(1.57079632679489661923) - 2 * u * series : u * series;
}

// What the expressions are written in.
#define OF_EACH(T, L)                                                                             \
    INLINE Vec<T, L> absolute(Vec<T, L> v) { return absolute_of<T, L>(v); }                       \
    INLINE Vec<T, L> with_sign(Vec<T, L> v, Vec<T, L> z) { return with_sign_of<T, L>(v, z); }     \
    INLINE Vec<T, L> root(Vec<T, L> v) { return root_of<T, L>(v); }                               \
    INLINE Vec<T, L> arcsine(Vec<T, L> v) { return arcsine_of<T, L>(v); }                         \
    INLINE Vec<T, L> inverse(Vec<T, L> v) { return v > 0 ? 1 / v : Vec<T, L>{}; }                 \
    INLINE Vec<T, L> power(Vec<T, L> v, T q) { return power_of<T, L>(v, q); }                     \
    INLINE Vec<T, L> term(Vec<T, L> z, T q) { (void)q; return TERM; }                             \
    INLINE Vec<T, L> term_slope(Vec<T, L> z, T q) { (void)q; return TERM_SLOPE; }                 \
    INLINE Vec<T, L> outer(Vec<T, L> s, T q) { (void)q; return OUTER; }                           \
    INLINE Vec<T, L> outer_slope(Vec<T, L> s, T q) { (void)q; (void)s; return OUTER_SLOPE; }
OF_EACH(float, FLOATS)
OF_EACH(double, DOUBLES)

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

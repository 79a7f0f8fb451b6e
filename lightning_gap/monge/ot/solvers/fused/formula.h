// Vectors of numbers as GCC and Clang know them, functions of them, and a cost's expressions, which a macro gives each.
//
// The cost is scale * OUTER(sum_k TERM(x_k - y_k)): the compiler is given both, and their slopes, as expressions in the
// difference z, the sum s, and a number q.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../../../../vectors.h"

namespace {

constexpr long FLOATS = VECTOR_BYTES / sizeof(float);

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

// By halves, which do not wait for each other as one number after the other does.
template <class T, long L> INLINE T sum_of(Vec<T, L> v) {
    if constexpr (L == 1) {
        return v[0];
    } else {
        Vec<T, L / 2> halves[2];
        std::memcpy(halves, &v, sizeof v);
        return sum_of<T, L / 2>(halves[0] + halves[1]);
    }
}
template <class T, long L> INLINE T largest_of(Vec<T, L> v) {
    if constexpr (L == 1) {
        return v[0];
    } else {
        Vec<T, L / 2> halves[2];
        std::memcpy(halves, &v, sizeof v);
        return largest_of<T, L / 2>(halves[0] > halves[1] ? halves[0] : halves[1]);
    }
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
        return v > 1e-36f ? r + inverse * 0.5f * (v - r * r) : Vec<T, L>{};
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
    p = given > Format<T>::most ? all<T, L>(std::numeric_limits<T>::infinity()) : p;
    return given < Format<T>::least ? Vec<T, L>{} : p;
}

// log v = e log 2 + 2 atanh((m - 1) / (m + 1)) for normal v > 0, with a mantissa m within a root of 2 of 1.
template <class T, long L> INLINE Vec<T, L> logarithm_of(Vec<T, L> v) {
    Ints<T, L> bits = (Ints<T, L>)v, e = (bits - Format<T>::root_half) >> Format<T>::mantissa;
    Vec<T, L> m = (Vec<T, L>)(bits - (e << Format<T>::mantissa)), u = (m - 1) / (m + 1), square = u * u;
    Vec<T, L> series = all<T, L>(T(1) / (2 * Format<T>::log_terms - 1));
#pragma GCC unroll 16
    for (int k = Format<T>::log_terms - 2; k >= 0; --k) series = series * square + T(1) / (2 * k + 1);
    Vec<T, L> log = 2 * u * series;
    return log + __builtin_convertvector(e, Vec<T, L>) * T(0.693147180559945309417);
}

// v^q for v >= 0.
template <class T, long L> INLINE Vec<T, L> power_of(Vec<T, L> v, T q) {
    return v > 0 ? exponential_of<T, L>(q * logarithm_of<T, L>(v)) : all<T, L>(T(q == 0));
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

}  // namespace

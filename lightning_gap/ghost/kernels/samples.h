// Samples of any floating type as vectors of the numbers they are computed in, and where a call finds them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../../vectors.h"

#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace {

// Half precision is a way to keep samples: they are computed in float, as are weights and statistics beside them.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};
template <class S> struct Computed {
    typedef S type;
};
template <> struct Computed<bfloat16> {
    typedef float type;
};
template <> struct Computed<float16> {
    typedef float type;
};
template <class S> using Number = typename Computed<S>::type;

// Vectors are those of GCC and Clang, which make of them what the processor has.
template <class T> constexpr long LANES = VECTOR_BYTES / sizeof(T);
template <class T> struct Types {
    typedef T vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    typedef T part __attribute__((vector_size(DOUBLES * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <> struct Types<uint16_t> {
    typedef uint16_t vec __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
};
template <class T> using Vec = typename Types<T>::vec;
template <class T> using Part = typename Types<T>::part;  // as many as a vector has doubles
typedef Vec<double> Wide;
typedef Vec<uint32_t> Words;
typedef Vec<uint16_t> Halves;  // half as long
template <class T> using Mask = decltype(Vec<T>() < Vec<T>());

INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const Vec<float>*>(p); }
INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const Vec<double>*>(p); }
INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<Vec<float>*>(p) = v; }
INLINE void store(double* p, Vec<double> v) { *reinterpret_cast<Vec<double>*>(p) = v; }

template <class S> INLINE Words load_words(const S* p) {
    return __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
}
template <class S> INLINE void store_words(S* p, Words w) {
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(w, Halves);
}
// One of two, where a mask says so.
INLINE Words either(Words mask, Words a, Words b) { return (mask & a) | (~mask & b); }

INLINE Vec<float> load(const bfloat16* p) { return (Vec<float>)(load_words(p) << 16); }
INLINE void store(bfloat16* p, Vec<float> v) {
    const Words w = (Words)v;
    store_words(p, either((Words)(v != v), Words{} + 0x7fc0, (w + 0x7fff + ((w >> 16) & 1)) >> 16));
}

INLINE Vec<float> load(const float16* p) {
    const Words w = load_words(p), size = w & 0x7fff;
    // An exponent of 127 - 15 more, by a product, which is right for subnormal numbers too; the highest is infinity's.
    const Vec<float> scaled = (Vec<float>)(size << 13) * 0x1p112f;
    const Words infinite = (Words)(size >= 0x7c00) & 0x7f800000;
    return (Vec<float>)((Words)scaled | infinite | (w & 0x8000) << 16);
}
INLINE void store(float16* p, Vec<float> v) {
    const Words w = (Words)v, size = w & 0x7fffffff;
    const Words normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    const Words subnormal = (Words)((Vec<float>)size + 0.5f) - 0x3f000000;  // a half has the smallest one as last digit
    const Words large = either((Words)(size > 0x7f800000), Words{} + 0x7e00, Words{} + 0x7c00);
    const Words found = either((Words)(size < 0x38800000), subnormal, normal);
    store_words(p, either((Words)(size >= 0x477ff000), large, found) | (w & 0x80000000) >> 16);
}

template <class T> INLINE Wide load_wide(const T* p) {
    return __builtin_convertvector(*reinterpret_cast<const Part<T>*>(p), Wide);
}
template <class T> INLINE void store_narrow(T* p, Wide v) {
    *reinterpret_cast<Part<T>*>(p) = __builtin_convertvector(v, Part<T>);
}

// The first numbers of a vector, where there are no more.
template <class S> INLINE Vec<Number<S>> load_some(const S* p, long count) {
    S some[LANES<Number<S>>] = {};
    std::memcpy(some, p, count * sizeof(S));
    return load(some);
}
template <class S> INLINE void store_some(S* p, Vec<Number<S>> v, long count) {
    S some[LANES<Number<S>>];
    store(some, v);
    std::memcpy(p, some, count * sizeof(S));
}

// Whether a mask says so anywhere.
template <class M> INLINE bool any(M mask) {
    long found = 0;
    for (unsigned long l = 0; l < sizeof(M) / sizeof(mask[0]); ++l) found |= mask[l];
    return found;
}

INLINE double root(double v) { return std::sqrt(v); }
template <class V> INLINE V root(V v) {
    V r;
    for (unsigned long l = 0; l < sizeof(V) / sizeof(v[0]); ++l) r[l] = std::sqrt(v[l]);
    return r;
}

// Ghosts are `pieces` stretches of memory, `step` numbers apart, of `length` rows of all channels (channels inside) or
// of `length` positions of one channel (channels outside). The first of them are `apart` numbers from each other.
struct Layout {
    long pieces, length, step, apart, channels, ghosts, threads;
    long values() const { return pieces * length; }
};

// What a thread takes of a call: ghosts and channels, from and to; and the ghosts whose sums are added up to one.
struct Share {
    long first, last, begin, end, together;
};

template <class S> struct Forward {
    typedef Number<S> T;
    const S* x;
    const T *weight, *bias;  // may be null, for 1 and 0
    S* y;
    T *mean, *var, *invstd;  // tables (ghosts, channels); the variance is unbiased
    double eps;
};
template <class S> struct Backward {
    typedef Number<S> T;
    const S *x, *grad_y;
    const T *weight, *mean, *invstd;
    S* grad_x;                  // may be null
    double *products, *totals;  // of some ghosts together each, (., channels): sums of dy (x - mean) / sigma, and of dy
};

// Unbiased variance and 1 / sigma from a sum of squares; a NaN stays one.
template <class W, class T> INLINE void spread(W squares, T n, T eps, W& unbiased, W& invstd) {
    squares = squares < 0 ? W{} : squares;
    unbiased = squares * (1 / (n - 1));
    invstd = 1 / root(squares * (1 / n) + eps);
}

// Factors b, c of the gradient a dy + b (x - mean) + c.
template <class W, class T> INLINE void factors(W a, W invstd, T n, W product, W total, W& b, W& c) {
    const W share = a * (-1 / n);
    b = share * invstd * invstd * product;
    c = share * total;
}

// Rows of channels that are taken side by side.
constexpr long GROUP = 8;

// A walk over a ghost's rows: visits with where R rows begin, how far from each other, and which of the walk's rows the
// first one is.
struct Rows {
    long at, left, length, width, jump;
    Rows(const Layout& g, long ghost) : at(ghost * g.apart) {
        const bool alone = g.length == 1;  // rows of different samples, which are as far from each other
        left = length = alone ? g.pieces : g.length;
        width = alone ? g.step : g.channels;
        jump = g.step - length * width;
    }
    template <long MOST = GROUP, class F> INLINE_METHOD void over(long n, F visit) {
        for (long r = 0; r < n;) {
            const long stop = std::min(n, r + left);
            left -= stop - r;
            for (; r + MOST <= stop; r += MOST, at += MOST * width)
                visit(std::integral_constant<long, MOST>{}, at, width, r);
            for (; r < stop; ++r, at += width) visit(std::integral_constant<long, 1>{}, at, width, r);
            if (left == 0) at += jump, left = length;
        }
    }
    void skip(long n) {
        over(n, [](auto, long, long, long) {});
    }
};

}  // namespace

// Ghosts of which a channel's positions lie side by side: vectors along the positions.

#pragma once

#include <algorithm>
#include <type_traits>

#include "samples.h"

namespace {

// Vectors side by side, and terms of a sum before it goes on in double.
constexpr long SIDE = 4, TERMS = 16;
// Numbers that are taken at a time, which lie in a cache.
constexpr long BLOCK = 1 << 16;

enum Kind { WHOLE, LAST, FEW };  // the last vector overlaps the one before; a few positions are no vector

template <class T> struct Positions {
    static constexpr long L = LANES<T>;
    const Layout& g;
    Mask<T> mask;  // of what is new in a last vector, or there at all
    explicit Positions(const Layout& layout) : g(layout) {
        for (long l = 0; l < L; ++l) mask[l] = g.length < L ? -(l < g.length) : -(l >= L - g.length % L);
    }
    template <Kind KIND, class S> INLINE_METHOD Vec<T> get(const S* p) const {
        if constexpr (KIND == FEW) return load_some(p, g.length);
        else return load(p);
    }
    template <Kind KIND, class S> INLINE_METHOD void put(S* p, Vec<T> v) const {
        if constexpr (KIND == FEW) store_some(p, v, g.length);
        else store(p, v);
    }
    template <Kind KIND> INLINE_METHOD Vec<T> counted(Vec<T> v) const {
        return KIND == WHOLE ? v : (Vec<T>)((Mask<T>)v & mask);
    }
    // Calls visit(kind, offset, which of SIDE sums) with some pieces, and flush() after a few terms of each sum.
    template <class F, class G> INLINE_METHOD void over(long start, long pieces, F visit, G flush) const {
        constexpr std::integral_constant<Kind, WHOLE> whole{};
        constexpr std::integral_constant<Kind, LAST> last{};
        constexpr std::integral_constant<Kind, FEW> few{};
        long terms = 0;
        for (long k = 0; k < pieces; ++k, start += g.step) {
            long j = 0;
            while (j + SIDE * L <= g.length) {
                const long stop = std::min(g.length, j + (TERMS - terms) * SIDE * L);
                for (; j + SIDE * L <= stop; j += SIDE * L, ++terms)
                    for (long v = 0; v < SIDE; ++v) visit(whole, start + j + v * L, v);
                if (terms >= TERMS) flush(), terms = 0;
            }
            for (; j + L <= g.length; j += L, ++terms) visit(whole, start + j, 0);
            if (j < g.length) {
                if (g.length < L) visit(few, start, 0);
                else visit(last, start + g.length - L, 0);
                ++terms;
            }
            if (terms >= TERMS) flush(), terms = 0;
        }
        flush();
    }
};

// Sums in double of what is summed for a few terms in the type that samples are computed in.
template <class T> struct Sum {
    Vec<T> parts[SIDE] = {};
    double whole[LANES<T>] = {};
    INLINE_METHOD void flush() {
        Vec<T> sum = parts[0];
        for (long v = 1; v < SIDE; ++v) sum += parts[v];
        for (long v = 0; v < SIDE; ++v) parts[v] = Vec<T>{};
        T terms[LANES<T>];
        store(terms, sum);
        for (long l = 0; l < LANES<T>; l += DOUBLES) store(whole + l, load(whole + l) + load_wide(terms + l));
    }
    INLINE_METHOD double value() const {
        double sum = 0;
        for (long l = 0; l < LANES<T>; ++l) sum += whole[l];
        return sum;
    }
};

template <class S> void forward_over(const Layout& g, const Share& share, const Forward<S>& f) {
    typedef Number<S> T;
    const Positions<T> positions(g);
    const long block = std::max(1L, BLOCK / g.length);
    for (long ghost = share.first; ghost < share.last; ++ghost)
        for (long c = share.begin; c < share.end; ++c) {
            const long start = ghost * g.apart + c * g.length;
            double mean = 0, squares = 0;
            for (long done = 0; done < g.pieces; done += block) {
                const long some = std::min(block, g.pieces - done), from = start + done * g.step;
                const double n = double(some * g.length), part = double(some) / double(done + some);
                Sum<T> rough, s, q;
                positions.over(from, some, [&](auto kind, long at, long v) INLINE_LAMBDA {
                    constexpr Kind K = decltype(kind)::value;
                    rough.parts[v] += positions.template counted<K>(positions.template get<K>(f.x + at));
                }, [&]() INLINE_LAMBDA { rough.flush(); });
                const T center = T(rough.value() / n);
                positions.over(from, some, [&](auto kind, long at, long v) INLINE_LAMBDA {
                    constexpr Kind K = decltype(kind)::value;
                    const Vec<T> d = positions.template counted<K>(positions.template get<K>(f.x + at) - center);
                    s.parts[v] += d;
                    q.parts[v] += d * d;
                }, [&]() INLINE_LAMBDA { s.flush(), q.flush(); });
                const double sum = s.value(), off = sum / n, own = center + off, delta = done ? own - mean : 0;
                mean = done ? mean + delta * part : own;
                squares += q.value() - sum * off + delta * delta * double(done * g.length) * part;
            }
            const long at = ghost * g.channels + c;
            double unbiased, invstd;
            spread(squares, double(g.values()), f.eps, unbiased, invstd);
            f.mean[at] = T(mean), f.var[at] = T(unbiased), f.invstd[at] = T(invstd);
            const T scale = T(f.weight ? invstd * f.weight[c] : invstd), rounded = T(mean);
            const T shift = T((f.bias ? f.bias[c] : 0) - (mean - double(rounded)) * scale);
            positions.over(start, g.pieces, [&](auto kind, long at, long) INLINE_LAMBDA {
                constexpr Kind K = decltype(kind)::value;
                positions.template put<K>(f.y + at, (positions.template get<K>(f.x + at) - rounded) * scale + shift);
            }, [] {});
        }
}

template <class S> void backward_over(const Layout& g, const Share& share, const Backward<S>& f) {
    typedef Number<S> T;
    const Positions<T> positions(g);
    for (long ghost = share.first; ghost < share.last; ++ghost)
        for (long c = share.begin; c < share.end; ++c) {
            const long start = ghost * g.apart + c * g.length, table = ghost * g.channels + c;
            const T mean = f.mean[table];
            Sum<T> p, s;
            positions.over(start, g.pieces, [&](auto kind, long at, long v) INLINE_LAMBDA {
                constexpr Kind K = decltype(kind)::value;
                const Vec<T> dy = positions.template counted<K>(positions.template get<K>(f.grad_y + at));
                s.parts[v] += dy;
                p.parts[v] += positions.template counted<K>(dy * (positions.template get<K>(f.x + at) - mean));
            }, [&]() INLINE_LAMBDA { s.flush(), p.flush(); });
            const double invstd = f.invstd[table], scale = f.weight ? invstd * f.weight[c] : invstd;
            const double product = p.value(), total = s.value();
            const long sums = ghost / share.together * g.channels + c;
            const bool first = ghost % share.together == 0;
            f.products[sums] = (first ? 0 : f.products[sums]) + product * invstd;
            f.totals[sums] = (first ? 0 : f.totals[sums]) + total;
            if (!f.grad_x) continue;
            double slope_of_x, rest;
            factors(scale, invstd, double(g.values()), product, total, slope_of_x, rest);
            const T slope = T(scale), tilt = T(slope_of_x), level = T(rest);
            positions.over(start, g.pieces, [&](auto kind, long at, long) INLINE_LAMBDA {
                constexpr Kind K = decltype(kind)::value;
                const Vec<T> d = positions.template get<K>(f.x + at) - mean;
                const Vec<T> dy = positions.template get<K>(f.grad_y + at);
                positions.template put<K>(f.grad_x + at, dy * slope + (d * tilt + level));
            }, [] {});
        }
}

}  // namespace

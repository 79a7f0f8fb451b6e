// Ghost batch normalization forward and backward, each visiting a ghost's samples once while they lie in a cache.
//
// A ghost is `pieces` stretches of memory, `step` numbers apart, of `length` rows of all channels (channels inside) or
// of `length` positions of one channel (channels outside). Deviations are taken from a rough mean, which needs to be no
// better than that: what they add up to corrects it, in double. Sums are in the samples' type for a few terms, and in
// double from there on. Vectors are those of GCC and Clang, which make of them what the processor has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../../vectors.h"

#define INLINE_METHOD inline __attribute__((always_inline))

namespace {

// Vectors side by side, and terms of a sum before it goes on in double.
constexpr long SIDE = 4, TERMS = 16;
// Numbers that are taken at a time, which lie in a cache.
constexpr long BLOCK = 1 << 16;

template <class T> constexpr long LANES = VECTOR_BYTES / sizeof(T);
template <class T> struct Types {
    typedef T vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
    typedef T part __attribute__((vector_size(DOUBLES * sizeof(T)), aligned(sizeof(T)), may_alias));
    typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type integer;
    typedef integer ints __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using Vec = typename Types<T>::vec;
template <class T> using Part = typename Types<T>::part;  // as many as a vector has doubles
template <class T> using Ints = typename Types<T>::ints;
typedef Vec<double> Wide;

template <class T> INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T> INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<Vec<T>*>(p) = v; }
template <class T> INLINE Wide load_wide(const T* p) {
    return __builtin_convertvector(*reinterpret_cast<const Part<T>*>(p), Wide);
}
template <class T> INLINE void store_narrow(T* p, Wide v) {
    *reinterpret_cast<Part<T>*>(p) = __builtin_convertvector(v, Part<T>);
}
template <class T> INLINE void add_to(double* sums, Vec<T> v) {
    T terms[LANES<T>];
    store(terms, v);
    for (long l = 0; l < LANES<T>; l += DOUBLES) store(sums + l, load(sums + l) + load_wide(terms + l));
}

// The next ghost's samples come near while this one's results are written.
template <class T> INLINE void expect(const T* p) { __builtin_prefetch(p, 0, 2); }

// The first numbers of a vector, where there are no more.
template <class T> INLINE Vec<T> load_some(const T* p, long count) {
    T some[LANES<T>] = {};
    std::memcpy(some, p, count * sizeof(T));
    return load(some);
}
template <class T> INLINE void store_some(T* p, Vec<T> v, long count) {
    T some[LANES<T>];
    store(some, v);
    std::memcpy(p, some, count * sizeof(T));
}

struct Layout {
    long pieces, length, step, apart, channels;  // step and apart, from ghost to ghost, in numbers
    long first, last, begin, end;                // ghosts and channels of this call
    long together;                               // ghosts whose gradients of weight and bias are added up
    long values() const { return pieces * length; }
};

template <class T> struct Forward {
    const T *x, *weight, *bias;
    T *y, *mean, *var, *invstd;  // tables (ghosts, channels); the variance is unbiased
    double eps;
};
template <class T> struct Backward {
    const T *x, *grad_y, *weight, *mean, *invstd;
    T* grad_x;                  // may be null
    double *products, *totals;  // of some ghosts together each, (., channels): sums of dy (x - mean) / sigma, and of dy
};

INLINE double root(double v) { return std::sqrt(v); }
INLINE Wide root(Wide v) {
    Wide r;
    for (long l = 0; l < DOUBLES; ++l) r[l] = std::sqrt(v[l]);
    return r;
}

// Unbiased variance and 1 / sigma from a sum of squares; a NaN stays one.
template <class W> INLINE void spread(W squares, double n, double eps, W& unbiased, W& invstd) {
    squares = squares < 0 ? W{} : squares;
    unbiased = squares * (1 / (n - 1));
    invstd = 1 / root(squares * (1 / n) + eps);
}

// Factors b, c of the gradient a dy + b (x - mean) + c.
template <class W> INLINE void factors(W a, W invstd, double n, W product, W total, W& b, W& c) {
    const W share = a * (-1 / n);
    b = share * invstd * invstd * product;
    c = share * total;
}

// Channels inside. Rows are taken GROUP at a time, and in them all channels, as memory lies. Numbers of channels are in
// slots, one vector each; where channels are no whole vectors, the last slot overlaps the one before.
template <class T, bool PART> struct Channels {
    static constexpr long L = LANES<T>;
    long begin, last, some, slots, size;  // with PART, there are less channels than a vector has numbers
    explicit Channels(const Layout& g)
        : begin(g.begin), last(g.end - L), some(g.end - g.begin), slots((some + L - 1) / L), size(slots * L) {}
    INLINE_METHOD long at(long slot) const { return PART ? begin : std::min(begin + slot * L, last); }
    INLINE_METHOD Vec<T> get(const T* p, long slot) const { return PART ? load_some(p + begin, some) : load(p + at(slot)); }
    INLINE_METHOD void put(T* p, long slot, Vec<T> v) const {
        if (PART) store_some(p + begin, v, some);
        else store(p + at(slot), v);
    }
    template <class S> INLINE_METHOD void copy_in(S* own, const S* p, long slot) const {
        std::memcpy(own, p + at(slot), (PART ? some : L) * sizeof(S));
    }
    template <class S> INLINE_METHOD void copy_out(S* p, const S* own, long slot) const {
        std::memcpy(p + at(slot), own, (PART ? some : L) * sizeof(S));
    }
};

// Rows side by side, and rows whose terms are added up before the sums go on in double.
constexpr long GROUP = 8, ROWS = 32;

// A walk over a ghost's rows: visits with where R rows lie, and which of the walk's rows the first one is.
struct Rows {
    long at, left, length, width, jump;
    Rows(const Layout& g, long ghost)
        : at(ghost * g.apart), left(g.length), length(g.length), width(g.channels), jump(g.step - g.length * g.channels) {}
    INLINE_METHOD long next() {
        const long here = at;
        at += width;
        if (--left == 0) at += jump, left = length;
        return here;
    }
    template <long MOST = GROUP, class F> INLINE_METHOD void over(long n, F visit) {
        long r = 0, where[GROUP];
        for (; r + MOST <= n; r += MOST) {
            for (long k = 0; k < MOST; ++k) where[k] = next();
            visit(std::integral_constant<long, MOST>{}, where, r);
        }
        for (; r < n; ++r) {
            where[0] = next();
            visit(std::integral_constant<long, 1>{}, where, r);
        }
    }
};

// Numbers of the channels of a ghost, and rows that are kept.
template <class T> struct Room {
    std::vector<T> numbers, kept_rows;
    std::vector<double> sums;
    long size;
    T *center, *scale, *shift, *level, *terms, *kept;
    double *sum, *squares, *mean, *whole;
    Room(long channels, long rows) : numbers(6 * channels), kept_rows(rows * channels), sums(4 * channels), size(channels) {
        center = numbers.data(), scale = center + size, shift = scale + size, level = shift + size, terms = level + size;
        sum = sums.data(), squares = sum + size, mean = squares + size, whole = mean + size;
        kept = rows ? kept_rows.data() : nullptr;
    }
    void clear() { std::fill(sum, mean, 0.0), std::fill(terms, terms + 2 * size, T(0)); }
    INLINE_METHOD void add_terms() {
        for (long l = 0; l < 2 * size; ++l) sum[l] += terms[l], terms[l] = 0;
    }
};

// Sums of n rows' deviations from a center, and of their squares; the rows may be kept.
template <bool KEEP, class T, bool PART>
INLINE void deviations_from_center(const Channels<T, PART> channels, Rows rows, long n, const T* x, Room<T>& room) {
    constexpr long L = LANES<T>;
    const T* center = room.center;
    T *s = room.terms, *q = s + channels.size;
    room.clear();
    for (long done = 0; done < n; done += ROWS) {
        T* kept = room.kept + done * channels.size;
        rows.over(std::min(ROWS, n - done), [=](auto count, const long* where, long first) __attribute__((always_inline)) {
            constexpr long R = decltype(count)::value;
            for (long k = 0; k < channels.slots; ++k) {
                const Vec<T> m = load(center + k * L);
                Vec<T> sum = {}, squares = {};
#pragma GCC unroll 8
                for (long r = 0; r < R; ++r) {
                    const Vec<T> e = channels.get(x + where[r], k), d = e - m;
                    if (KEEP) store(kept + (first + r) * channels.size + k * L, e);
                    sum += d;
                    squares += d * d;
                }
                store<T>(s + k * L, load(s + k * L) + sum);
                store<T>(q + k * L, load(q + k * L) + squares);
            }
        });
        room.add_terms();
    }
}

// Moments of n rows. A center that some rows tell is good where it is no farther from the mean than values are; else
// squares would cancel, and deviations are taken again, from the mean.
template <bool KEEP, class T, bool PART>
INLINE void deviations(const Channels<T, PART> channels, const Rows start, long n, const T* x, Room<T>& room) {
    constexpr long L = LANES<T>;
    T* center = room.center;
    const long some = std::min(n, GROUP);
    std::fill(center, center + channels.size, T(0));
    Rows rows = start;
    rows.over(some, [=](auto count, const long* where, long) __attribute__((always_inline)) {
        constexpr long R = decltype(count)::value;
        for (long k = 0; k < channels.slots; ++k) {
            Vec<T> rough = load(center + k * L);
#pragma GCC unroll 8
            for (long r = 0; r < R; ++r) rough += channels.get(x + where[r], k);
            store<T>(center + k * L, rough);
        }
    });
    for (long l = 0; l < channels.size; ++l) center[l] *= T(1) / T(some);
    deviations_from_center<KEEP>(channels, start, n, x, room);
    long again = 0;
    const double inverse = 1.0 / n;
    for (long l = 0; l < channels.size; ++l) {
        const double off = room.sum[l] * inverse;
        const bool far = off * room.sum[l] * 2 > room.squares[l];
        // The others keep their centers, and get the same sums: what a channel gives depends on no other.
        center[l] = far ? T(center[l] + off) : center[l];
        again += far;
    }
    if (again == 0) return;
    deviations_from_center<false>(channels, start, n, x, room);
}

// Statistics from moments, into the tables, and what makes y of x - center: a scale, and a shift.
template <class T, bool PART>
INLINE void finish(const Channels<T, PART>& channels, const Forward<T>& f, long table, double n, Room<T>& room) {
    constexpr long L = LANES<T>;
    for (long k = 0; k < channels.slots; ++k) {
        T weight[L] = {}, bias[L] = {}, mean[L], var[L], invstd[L];
        if (f.weight) channels.copy_in(weight, f.weight, k);
        if (f.bias) channels.copy_in(bias, f.bias, k);
        for (long l = 0; l < L; l += DOUBLES) {
            const long at = k * L + l;
            const Wide s = load(room.sum + at), off = s * (1 / n);
            Wide unbiased, inverse;
            spread<Wide>(load(room.squares + at) - s * off, n, f.eps, unbiased, inverse);
            store_narrow(mean + l, load_wide(room.center + at) + off);
            store_narrow(var + l, unbiased);
            store_narrow(invstd + l, inverse);
            const Wide a = f.weight ? inverse * load_wide(weight + l) : inverse;
            store_narrow(room.scale + at, a);
            store_narrow(room.shift + at, load_wide(bias + l) - off * a);
        }
        channels.copy_out(f.mean + table, mean, k);
        channels.copy_out(f.var + table, var, k);
        channels.copy_out(f.invstd + table, invstd, k);
    }
}

// The factors of a gradient from its sums; and what weight and bias have of these.
template <class T, bool PART>
INLINE void finish(const Channels<T, PART>& channels, const Backward<T>& f, long table, double n, Room<T>& room) {
    constexpr long L = LANES<T>;
    double *const products = room.mean, *const totals = room.whole;
    for (long k = 0; k < channels.slots; ++k) {
        T weight[L] = {}, invstd[L] = {};
        if (f.weight) channels.copy_in(weight, f.weight, k);
        channels.copy_in(invstd, f.invstd + table, k);
        for (long l = 0; l < L; l += DOUBLES) {
            const long at = k * L + l;
            const Wide inverse = load_wide(invstd + l), a = f.weight ? inverse * load_wide(weight + l) : inverse;
            Wide slope, level;
            factors<Wide>(a, inverse, n, load(room.squares + at), load(room.sum + at), slope, level);
            store_narrow(room.scale + at, a);
            store_narrow(room.shift + at, slope);
            store_narrow(room.level + at, level);
            store<double>(products + at, load(products + at) + load(room.squares + at) * inverse);
            store<double>(totals + at, load(totals + at) + load(room.sum + at));
        }
    }
}

template <bool KEPT, class T, bool PART>
INLINE void write(const Channels<T, PART> channels, Rows rows, long n, const Forward<T>& f, const Room<T>& room) {
    constexpr long L = LANES<T>;
    const T *x = f.x, *center = room.center, *scale = room.scale, *shift = room.shift, *kept = room.kept;
    T* y = f.y;
    rows.template over<1>(n, [=](auto count, const long* where, long first) __attribute__((always_inline)) {
        constexpr long R = decltype(count)::value;
        for (long k = 0; k < channels.slots; ++k) {
            const Vec<T> m = load(center + k * L), a = load(scale + k * L), b = load(shift + k * L);
#pragma GCC unroll 8
            for (long r = 0; r < R; ++r) {
                const Vec<T> e =
                    KEPT ? load(kept + (first + r) * channels.size + k * L) : channels.get(x + where[r], k);
                channels.put(y + where[r], k, (e - m) * a + b);
            }
        }
    });
}

// A ghost of more rows than are taken at a time has the moments of some joined by Chan's way.
template <class T, bool PART, bool KEEP> INLINE void forward_rows(const Layout& g, const Forward<T>& f) {
    const Channels<T, PART> channels(g);
    const long n = g.values(), most = std::max(2 * GROUP, BLOCK / g.channels), block = std::min(n, most);
    Room<T> room(channels.size, KEEP ? block : 0);
    for (long ghost = g.first; ghost < g.last; ++ghost) {
        const Rows start(g, ghost);
        if (block == n) {
            deviations<KEEP>(channels, start, n, f.x, room);
            finish(channels, f, ghost * g.channels, n, room);
            write<KEEP>(channels, start, n, f, room);
            continue;
        }
        Rows rows = start;
        for (long done = 0; done < n; done += block) {
            const long some = std::min(block, n - done);
            deviations<KEEP>(channels, rows, some, f.x, room);
            rows.over(some, [](auto, const long*, long) {});
            const double share = double(some) / (done + some), weight = done * share;
            for (long l = 0; l < channels.size; ++l) {
                const double off = room.sum[l] / some, own = room.center[l] + off, delta = done ? own - room.mean[l] : 0;
                const double squares = room.squares[l] - room.sum[l] * off;
                room.mean[l] = done ? room.mean[l] + delta * share : own;
                room.whole[l] = done ? room.whole[l] + squares + delta * delta * weight : squares;
            }
        }
        for (long l = 0; l < channels.size; ++l) {
            // What the mean loses as it is rounded is an offset.
            room.center[l] = T(room.mean[l]);
            const double off = room.mean[l] - room.center[l];
            room.sum[l] = off * n;
            room.squares[l] = room.whole[l] + off * off * n;
        }
        finish(channels, f, ghost * g.channels, n, room);
        write<false>(channels, start, n, f, room);
    }
}

template <class T> void forward_inside(const Layout& g, const Forward<T>& f) {
    if (g.end - g.begin < LANES<T>) forward_rows<T, true, false>(g, f);
    else if (g.length < GROUP) forward_rows<T, false, true>(g, f);  // far rows may share a cache's places
    else forward_rows<T, false, false>(g, f);
}

template <class T, bool PART> INLINE void backward_rows(const Layout& g, const Backward<T>& f) {
    constexpr long L = LANES<T>;
    const Channels<T, PART> channels(g);
    const long n = g.values();
    Room<T> room(channels.size, 0);
    const T *x = f.x, *grad_y = f.grad_y, *center = room.center, *scale = room.scale, *slope = room.shift, *level = room.level;
    T *totals = room.terms, *products = totals + channels.size;
    T* grad_x = f.grad_x;
    const long apart = n * channels.size <= BLOCK ? g.apart : 0;  // else it would be gone by the time
    for (long ghost = g.first; ghost < g.last; ++ghost) {
        const Rows start(g, ghost);
        for (long k = 0; k < channels.slots; ++k) store(room.center + k * L, channels.get(f.mean + ghost * g.channels, k));
        room.clear();
        Rows rows = start;
        for (long done = 0; done < n; done += ROWS) {
            rows.over(std::min(ROWS, n - done), [=](auto count, const long* where, long) __attribute__((always_inline)) {
                constexpr long R = decltype(count)::value;
                for (long k = 0; k < channels.slots; ++k) {
                    const Vec<T> m = load(center + k * L);
                    Vec<T> sum = {}, product = {};
#pragma GCC unroll 8
                    for (long r = 0; r < R; ++r) {
                        const Vec<T> dy = channels.get(grad_y + where[r], k);
                        sum += dy;
                        product += dy * (channels.get(x + where[r], k) - m);
                    }
                    store<T>(totals + k * L, load(totals + k * L) + sum);
                    store<T>(products + k * L, load(products + k * L) + product);
                }
            });
            room.add_terms();
        }
        finish(channels, f, ghost * g.channels, n, room);
        if ((ghost + 1) % g.together == 0 || ghost + 1 == g.last) {
            const long table = ghost / g.together * g.channels;
            for (long k = 0; k < channels.slots; ++k) {
                channels.copy_out(f.products + table, room.mean + k * L, k);
                channels.copy_out(f.totals + table, room.whole + k * L, k);
            }
            std::fill(room.mean, room.mean + 2 * channels.size, 0.0);
        }
        if (!grad_x) continue;
        rows = start;
        rows.template over<1>(n, [=](auto count, const long* where, long) __attribute__((always_inline)) {
            constexpr long R = decltype(count)::value;
            for (long k = 0; k < channels.slots; ++k) {
                const Vec<T> m = load(center + k * L), a = load(scale + k * L), b = load(slope + k * L);
                const Vec<T> c = load(level + k * L);
#pragma GCC unroll 8
                for (long r = 0; r < R; ++r) {
                    expect(x + where[r] + k * L + apart);
                    expect(grad_y + where[r] + k * L + apart);
                    const Vec<T> d = channels.get(x + where[r], k) - m, dy = channels.get(grad_y + where[r], k);
                    channels.put(grad_x + where[r], k, a * dy + (b * d + c));
                }
            }
        });
    }
}

template <class T> void backward_inside(const Layout& g, const Backward<T>& f) {
    if (g.end - g.begin < LANES<T>) backward_rows<T, true>(g, f);
    else backward_rows<T, false>(g, f);
}

// Channels outside: vectors along the positions of a channel.

enum Kind { WHOLE, LAST, FEW };  // the last vector overlaps the one before; a few positions are no vector

template <class T> struct Positions {
    static constexpr long L = LANES<T>;
    const Layout& g;
    Ints<T> mask;  // of what is new in a last vector, or there at all
    explicit Positions(const Layout& layout) : g(layout) {
        for (long l = 0; l < L; ++l) mask[l] = g.length < L ? -(l < g.length) : -(l >= L - g.length % L);
    }
    template <Kind KIND> INLINE_METHOD Vec<T> get(const T* p) const { return KIND == FEW ? load_some(p, g.length) : load(p); }
    template <Kind KIND> INLINE_METHOD void put(T* p, Vec<T> v) const {
        if (KIND == FEW) store_some(p, v, g.length);
        else store(p, v);
    }
    template <Kind KIND> INLINE_METHOD Vec<T> counted(Vec<T> v) const {
        return KIND == WHOLE ? v : (Vec<T>)((Ints<T>)v & mask);
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

// Sums in double of what is summed for a few terms in the samples' type.
template <class T> struct Sum {
    Vec<T> parts[SIDE] = {};
    double whole[LANES<T>] = {};
    INLINE_METHOD void flush() {
        Vec<T> sum = parts[0];
        for (long v = 1; v < SIDE; ++v) sum += parts[v];
        for (long v = 0; v < SIDE; ++v) parts[v] = Vec<T>{};
        add_to<T>(whole, sum);
    }
    INLINE_METHOD double value() const {
        double sum = 0;
        for (long l = 0; l < LANES<T>; ++l) sum += whole[l];
        return sum;
    }
};

template <class T> void forward_outside(const Layout& g, const Forward<T>& f) {
    const Positions<T> positions(g);
    const long block = std::max(1L, BLOCK / g.length);
    for (long ghost = g.first; ghost < g.last; ++ghost)
        for (long c = g.begin; c < g.end; ++c) {
            const long start = ghost * g.apart + c * g.length;
            double mean = 0, squares = 0;
            for (long done = 0; done < g.pieces; done += block) {
                const long some = std::min(block, g.pieces - done), from = start + done * g.step;
                const double n = double(some * g.length), share = double(some) / (done + some);
                Sum<T> rough, s, q;
                positions.over(from, some, [&](auto kind, long at, long v) __attribute__((always_inline)) {
                    constexpr Kind K = decltype(kind)::value;
                    rough.parts[v] += positions.template counted<K>(positions.template get<K>(f.x + at));
                }, [&]() __attribute__((always_inline)) { rough.flush(); });
                const T center = T(rough.value() / n);
                positions.over(from, some, [&](auto kind, long at, long v) __attribute__((always_inline)) {
                    constexpr Kind K = decltype(kind)::value;
                    const Vec<T> d = positions.template counted<K>(positions.template get<K>(f.x + at) - center);
                    s.parts[v] += d;
                    q.parts[v] += d * d;
                }, [&]() __attribute__((always_inline)) { s.flush(), q.flush(); });
                const double sum = s.value(), off = sum / n, own = center + off, delta = done ? own - mean : 0;
                mean = done ? mean + delta * share : own;
                squares += q.value() - sum * off + delta * delta * (done * g.length) * share;
            }
            const long at = ghost * g.channels + c;
            double unbiased, invstd;
            spread<double>(squares, double(g.values()), f.eps, unbiased, invstd);
            f.mean[at] = T(mean), f.var[at] = T(unbiased), f.invstd[at] = T(invstd);
            const T scale = T(f.weight ? invstd * f.weight[c] : invstd), rounded = T(mean);
            const T shift = T((f.bias ? f.bias[c] : 0) - (mean - double(rounded)) * scale);
            positions.over(start, g.pieces, [&](auto kind, long at, long) __attribute__((always_inline)) {
                constexpr Kind K = decltype(kind)::value;
                positions.template put<K>(f.y + at, (positions.template get<K>(f.x + at) - rounded) * scale + shift);
            }, [] {});
        }
}

template <class T> void backward_outside(const Layout& g, const Backward<T>& f) {
    const Positions<T> positions(g);
    for (long ghost = g.first; ghost < g.last; ++ghost)
        for (long c = g.begin; c < g.end; ++c) {
            const long start = ghost * g.apart + c * g.length, table = ghost * g.channels + c;
            const T mean = f.mean[table];
            Sum<T> p, s;
            positions.over(start, g.pieces, [&](auto kind, long at, long v) __attribute__((always_inline)) {
                constexpr Kind K = decltype(kind)::value;
                const Vec<T> dy = positions.template counted<K>(positions.template get<K>(f.grad_y + at));
                s.parts[v] += dy;
                p.parts[v] += positions.template counted<K>(dy * (positions.template get<K>(f.x + at) - mean));
            }, [&]() __attribute__((always_inline)) { s.flush(), p.flush(); });
            const double invstd = f.invstd[table], scale = f.weight ? invstd * f.weight[c] : invstd;
            const double product = p.value(), total = s.value();
            const long sums = ghost / g.together * g.channels + c;
            const bool first = ghost % g.together == 0;
            f.products[sums] = (first ? 0 : f.products[sums]) + product * invstd;
            f.totals[sums] = (first ? 0 : f.totals[sums]) + total;
            if (!f.grad_x) continue;
            double slope_of_x, rest;
            factors<double>(scale, invstd, double(g.values()), product, total, slope_of_x, rest);
            const T slope = T(scale), tilt = T(slope_of_x), level = T(rest);
            positions.over(start, g.pieces, [&](auto kind, long at, long) __attribute__((always_inline)) {
                constexpr Kind K = decltype(kind)::value;
                const Vec<T> d = positions.template get<K>(f.x + at) - mean;
                positions.template put<K>(f.grad_x + at, positions.template get<K>(f.grad_y + at) * slope + (d * tilt + level));
            }, [] {});
        }
}

}  // namespace

#define EXPORT(where, T)                                                                                                \
    extern "C" void forward_##where##_##T(const Layout* g, const T* x, T* y, const T* weight, const T* bias,            \
                                          double eps, T* mean, T* var, T* invstd) {                                     \
        forward_##where<T>(*g, {x, weight, bias, y, mean, var, invstd, eps});                                           \
    }                                                                                                                   \
    extern "C" void backward_##where##_##T(const Layout* g, const T* x, const T* grad_y, T* grad_x, const T* weight,    \
                                           const T* mean, const T* invstd, double* products, double* totals) {         \
        backward_##where<T>(*g, {x, grad_y, weight, mean, invstd, grad_x, products, totals});                           \
    }
EXPORT(inside, float)
EXPORT(inside, double)
EXPORT(outside, float)
EXPORT(outside, double)

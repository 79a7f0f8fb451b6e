// Ghosts whose channels lie side by side: features, channels_last images.
//
// Rows are taken GROUP at a time, and in them all channels, as memory lies. Numbers of channels are in slots, one vector
// each; where channels are no whole vectors, the last slot overlaps the one before. While a ghost lies in a cache, what
// is needed next comes near: the place of its results as its moments are taken, the next ghost as results are written.

#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "samples.h"

namespace {

// Rows that tell a rough mean, and rows whose terms are added up before the sums go on in double.
constexpr long SOME = 8, ROWS = 64;
// Slots of a row from which on results are written for fewer rows side by side.
constexpr long WIDE = 8, FEWER = 2;
// Numbers that are taken at a time, which lie in a cache; bytes of a ghost that leave room there for the next; and how
// many bytes ahead of what is done memory is asked for.
constexpr long BLOCK = 1 << 16, NEAR = 1 << 19, AHEAD = 1 << 13;

template <class S, bool PART> struct Channels {
    typedef Number<S> T;
    static constexpr long L = LANES<T>;
    long begin, last, some, slots;  // with PART, there are less channels than a vector has numbers
    explicit Channels(const Share& share)
        : begin(share.begin), last(share.end - L), some(share.end - begin), slots((some + L - 1) / L) {}
    INLINE_METHOD long at(long slot) const { return PART ? begin : std::min(begin + slot * L, last); }
    template <class R> INLINE_METHOD Vec<T> get(const R* p) const {
        if constexpr (PART) return load_some(p, some);
        else return load(p);
    }
    template <class R> INLINE_METHOD void put(R* p, Vec<T> v) const {
        if constexpr (PART) store_some(p, v, some);
        else store(p, v);
    }
    INLINE_METHOD void put_wide(double* p, const double* own) const {
        std::memcpy(p, own, (PART ? some : L) * sizeof(double));
    }
};

// Into the second cache, which waits for more at a time than the first; so too what is to be written.
INLINE void expect(const void* p) { __builtin_prefetch(p, 0, 2); }

// What a slot has of each channel.
enum Kind : long { CENTER, SCALE, SHIFT, LEVEL, SUM, PRODUCT, KINDS };

// Numbers of a ghost's channels, and rows that are kept. SUM and PRODUCT are of a few terms, in the type that samples are
// computed in, and go on in double from there on.
template <class T> struct Room {
    static constexpr long L = LANES<T>;
    std::vector<T> numbers, kept_rows;
    std::vector<double> doubles;
    const long slots;
    const bool few;
    double *const whole, *const first, *const second;  // sums and products side by side; and of some ghosts or blocks
    Room(long slots, long rows, long n)
        : numbers(KINDS * slots * L), kept_rows(rows * slots * L), doubles(4 * slots * L), slots(slots), few(n <= ROWS),
          whole(doubles.data()), first(whole + 2 * slots * L), second(first + slots * L) {}
    INLINE_METHOD T* of(long slot, Kind kind) { return numbers.data() + (slot * KINDS + kind) * L; }
    INLINE_METHOD void clear() {
        for (long k = 0; k < slots; ++k) store(of(k, SUM), Vec<T>{}), store(of(k, PRODUCT), Vec<T>{});
        if (!few) std::fill(whole, first, 0.0);
    }
    INLINE_METHOD void add_terms() {
        for (long k = 0; !few && k < slots; ++k) {
            double* own = whole + 2 * k * L;  // PRODUCT is beside SUM
            for (long l = 0; l < 2 * L; l += DOUBLES) store(own + l, load(own + l) + load_wide(of(k, SUM) + l));
            store(of(k, SUM), Vec<T>{}), store(of(k, PRODUCT), Vec<T>{});
        }
    }
    // What the terms add up to, from a lane on.
    INLINE_METHOD Wide sum(long slot, long lane) {
        return few ? load_wide(of(slot, SUM) + lane) : load(whole + 2 * slot * L + lane);
    }
    INLINE_METHOD Wide product(long slot, long lane) {
        return few ? load_wide(of(slot, PRODUCT) + lane) : load(whole + (2 * slot + 1) * L + lane);
    }
};

// Sums of n rows' deviations from a center, and of their squares; the rows may be kept.
template <bool KEEP, class S, bool PART>
void deviations(const Channels<S, PART> channels, Rows rows, long n, const S* x, const S* next, Room<Number<S>>& room) {
    typedef Number<S> T;
    constexpr long L = LANES<T>;
    T* numbers = room.of(0, CENTER);
    room.clear();
    for (long done = 0; done < n; done += ROWS) {
        T* kept = room.kept_rows.data() + done * channels.slots * L;
        rows.over(std::min(ROWS, n - done), [=](auto count, long where, long width, long first) INLINE_LAMBDA {
            constexpr long R = decltype(count)::value;
            T* own = numbers;
            for (long k = 0; k < channels.slots; ++k, own += KINDS * L) {
                const long at = where + channels.at(k);
                const Vec<T> m = load(own + CENTER * L);
                Vec<T> sum = load(own + SUM * L), squares = load(own + PRODUCT * L);
#pragma GCC unroll 8
                for (long r = 0; r < R; ++r) {
                    expect(next + at + r * width);
                    const Vec<T> e = channels.get(x + at + r * width), d = e - m;
                    if (KEEP) store(kept + ((first + r) * channels.slots + k) * L, e);
                    sum += d;
                    squares += d * d;
                }
                store(own + SUM * L, sum);
                store(own + PRODUCT * L, squares);
            }
        });
        room.add_terms();
    }
}

// Moments of n rows: a CENTER, in SHIFT what the mean is off it, in LEVEL the squares' sum about the mean. A center that
// some rows tell is good where it is no farther from the mean than values are; else squares would cancel, and deviations
// are taken again, from the mean.
template <bool KEEP, class S, bool PART>
void moments(const Channels<S, PART> channels, const Rows start, long n, const S* x, const S* next, Room<Number<S>>& room) {
    typedef Number<S> T;
    constexpr long L = LANES<T>;
    T* numbers = room.of(0, CENTER);
    for (long k = 0; k < channels.slots; ++k) store(room.of(k, CENTER), Vec<T>{});
    Rows rows = start;
    const long some = std::min(n, SOME);
    const T share = T(1) / T(some);
    rows.over(some, [=](auto count, long where, long width, long) INLINE_LAMBDA {
        constexpr long R = decltype(count)::value;
        T* own = numbers;
        for (long k = 0; k < channels.slots; ++k, own += KINDS * L) {
            Vec<T> rough = load(own + CENTER * L);
#pragma GCC unroll 8
            for (long r = 0; r < R; ++r) rough += channels.get(x + where + channels.at(k) + r * width) * share;
            store(own + CENTER * L, rough);
        }
    });
    const double inverse = 1.0 / n;
    for (bool again = true, twice = false; again; twice = true) {
        deviations<KEEP>(channels, start, n, x, next, room);
        Mask<T> far = {};
        for (long k = 0; k < channels.slots; ++k) {
            for (long l = 0; l < L; l += DOUBLES) {
                const Wide sum = room.sum(k, l), off = sum * inverse;
                store_narrow(room.of(k, SHIFT) + l, off);
                store_narrow(room.of(k, LEVEL) + l, room.product(k, l) - sum * off);
            }
            const Vec<T> off = load(room.of(k, SHIFT));
            far |= off * off * T(n) > load(room.of(k, LEVEL));
        }
        again = !twice && any(far);
        for (long k = 0; again && k < channels.slots; ++k) {
            // The others keep their centers, and get the same sums: what a channel gives depends on no other.
            const Vec<T> off = load(room.of(k, SHIFT));
            const Vec<T> move = off * off * T(n) > load(room.of(k, LEVEL)) ? off : Vec<T>{};
            store(room.of(k, CENTER), load(room.of(k, CENTER)) + move);
        }
    }
}

// Joins a block's moments to those of the rows before it, by Chan's way.
template <class T> void join(long done, long some, Room<T>& room) {
    const double part = double(some) / double(done + some), weight = double(done) * part;
    for (long k = 0; k < room.slots; ++k)
        for (long l = 0; l < LANES<T>; l += DOUBLES) {
            double *mean = room.first + k * LANES<T> + l, *squares = room.second + k * LANES<T> + l;
            const Wide own = load_wide(room.of(k, CENTER) + l) + load_wide(room.of(k, SHIFT) + l);
            const Wide more = load_wide(room.of(k, LEVEL) + l);
            const Wide delta = done ? own - load(mean) : Wide{};
            store(mean, done ? load(mean) + delta * part : own);
            store(squares, done ? load(squares) + more + delta * delta * weight : more);
        }
}

// Of joined moments what the mean loses as it is rounded is an offset.
template <class T> void take_joined(Room<T>& room) {
    for (long k = 0; k < room.slots; ++k)
        for (long l = 0; l < LANES<T>; l += DOUBLES) {
            const Wide mean = load(room.first + k * LANES<T> + l);
            store_narrow(room.of(k, CENTER) + l, mean);
            store_narrow(room.of(k, SHIFT) + l, mean - load_wide(room.of(k, CENTER) + l));
            store_narrow(room.of(k, LEVEL) + l, load(room.second + k * LANES<T> + l));
        }
}

// Statistics from moments, into the tables, and what makes y of x - center: a SCALE, and a SHIFT.
template <class S, bool PART>
void finish(const Channels<S, PART> channels, const Forward<S> f, long table, long n, Room<Number<S>>& room) {
    typedef Number<S> T;
    for (long k = 0; k < channels.slots; ++k) {
        const long at = channels.at(k);
        const Vec<T> off = load(room.of(k, SHIFT));
        Vec<T> unbiased, invstd;
        spread(load(room.of(k, LEVEL)), T(n), T(f.eps), unbiased, invstd);
        channels.put(f.mean + table + at, load(room.of(k, CENTER)) + off);
        channels.put(f.var + table + at, unbiased);
        channels.put(f.invstd + table + at, invstd);
        const Vec<T> scale = f.weight ? invstd * channels.get(f.weight + at) : invstd, moved = off * scale;
        store(room.of(k, SCALE), scale);
        store(room.of(k, SHIFT), f.bias ? channels.get(f.bias + at) - moved : -moved);
    }
}

template <bool KEPT, class S, bool PART>
void write(
    const Channels<S, PART> channels, Rows rows, long n, const S* x, S* y, Room<Number<S>>& room, long ahead, long later
) {
    typedef Number<S> T;
    constexpr long L = LANES<T>;
    const T *numbers = room.of(0, CENTER), *kept = room.kept_rows.data();
    const auto visit = [=](auto count, long where, long width, long first) INLINE_LAMBDA {
        constexpr long R = decltype(count)::value;
        const T* own = numbers;
        for (long k = 0; k < channels.slots; ++k, own += KINDS * L) {
            const long at = where + channels.at(k);
            const Vec<T> m = load(own + CENTER * L), a = load(own + SCALE * L), b = load(own + SHIFT * L);
#pragma GCC unroll 8
            for (long r = 0; r < R; ++r) {
                const long here = at + r * width;
                expect(x + here + ahead);
                expect(y + here + later);
                const Vec<T> e = KEPT ? load(kept + ((first + r) * channels.slots + k) * L) : channels.get(x + here);
                channels.put(y + here, (e - m) * a + b);
            }
        }
    };
    if (channels.slots < WIDE) rows.over(n, visit);
    else rows.over<FEWER>(n, visit);
}

template <bool KEEP, class S, bool PART> void forward_rows(const Layout& g, const Share& share, const Forward<S>& f) {
    const Channels<S, PART> channels(share);
    const long n = g.values(), block = std::min(n, std::max(2 * SOME, BLOCK / g.channels));
    const bool near = 2 * n * channels.some * long(sizeof(S)) <= NEAR;
    const long some = AHEAD / long(sizeof(S)), ahead = near ? g.apart : some, later = near ? 0 : some;
    const S* next = near ? f.y : f.x + some;
    Room<Number<S>> room(channels.slots, KEEP ? n : 0, block);
    for (long ghost = share.first; ghost < share.last; ++ghost) {
        const Rows start(g, ghost);
        Rows rows = start;
        for (long done = 0; done < n; done += block) {
            const long count = std::min(block, n - done);
            moments<KEEP>(channels, rows, count, f.x, next, room);
            if (block == n) break;
            join(done, count, room);
            rows.skip(count);
        }
        if (block < n) take_joined(room);
        finish(channels, f, ghost * g.channels, n, room);
        write<KEEP>(channels, start, n, f.x, f.y, room, ahead, later);
    }
}

template <class S> void forward_over(const Layout& g, const Share& share, const Forward<S>& f) {
    // Far rows may share a cache's places: they are kept.
    const bool far = g.length < GROUP && g.pieces > 1 && g.values() * g.channels <= BLOCK;
    if (share.end - share.begin < LANES<Number<S>>) forward_rows<false, S, true>(g, share, f);
    else if (far) forward_rows<true, S, false>(g, share, f);
    else forward_rows<false, S, false>(g, share, f);
}

// Sums of a ghost's gradients, and of their products with deviations from the mean.
template <class S, bool PART>
void gradient_sums(
    const Channels<S, PART> channels, Rows rows, long n, const S* x, const S* grad_y, const S* next, const S* other,
    Room<Number<S>>& room
) {
    typedef Number<S> T;
    constexpr long L = LANES<T>;
    T* numbers = room.of(0, CENTER);
    room.clear();
    for (long done = 0; done < n; done += ROWS) {
        rows.over(std::min(ROWS, n - done), [=](auto count, long where, long width, long) INLINE_LAMBDA {
            constexpr long R = decltype(count)::value;
            T* own = numbers;
            for (long k = 0; k < channels.slots; ++k, own += KINDS * L) {
                const long at = where + channels.at(k);
                const Vec<T> m = load(own + CENTER * L);
                Vec<T> sum = load(own + SUM * L), product = load(own + PRODUCT * L);
#pragma GCC unroll 8
                for (long r = 0; r < R; ++r) {
                    const long here = at + r * width;
                    expect(next + here);
                    expect(other + here);
                    const Vec<T> dy = channels.get(grad_y + here);
                    sum += dy;
                    product += dy * (channels.get(x + here) - m);
                }
                store(own + SUM * L, sum);
                store(own + PRODUCT * L, product);
            }
        });
        room.add_terms();
    }
}

// The factors of a gradient from its sums; and what weight and bias have of these.
template <class S, bool PART>
void finish(const Channels<S, PART> channels, const Backward<S> f, long table, long n, Room<Number<S>>& room) {
    typedef Number<S> T;
    constexpr long L = LANES<T>;
    for (long k = 0; k < channels.slots; ++k) {
        const long at = channels.at(k);
        const Vec<T> invstd = channels.get(f.invstd + table + at);
        T scaled[L], product[L], total[L];
        store(scaled, invstd);
        for (long l = 0; l < L; l += DOUBLES) {
            const Wide p = room.product(k, l), s = room.sum(k, l);
            double *products = room.first + k * L + l, *totals = room.second + k * L + l;
            store_narrow(product + l, p);
            store_narrow(total + l, s);
            store(products, load(products) + p * load_wide(scaled + l));
            store(totals, load(totals) + s);
        }
        const Vec<T> scale = f.weight ? invstd * channels.get(f.weight + at) : invstd;
        Vec<T> slope, level;
        factors(scale, invstd, T(n), load(product), load(total), slope, level);
        store(room.of(k, SCALE), scale);
        store(room.of(k, SHIFT), slope);
        store(room.of(k, LEVEL), level);
    }
}

template <class S, bool PART>
void write_gradient(
    const Channels<S, PART> channels, Rows rows, long n, const Backward<S> f, Room<Number<S>>& room, long ahead, long later
) {
    typedef Number<S> T;
    constexpr long L = LANES<T>;
    const S *x = f.x, *grad_y = f.grad_y;
    S* grad_x = f.grad_x;
    const T* numbers = room.of(0, CENTER);
    const auto visit = [=](auto count, long where, long width, long) INLINE_LAMBDA {
        constexpr long R = decltype(count)::value;
        const T* own = numbers;
        for (long k = 0; k < channels.slots; ++k, own += KINDS * L) {
            const long at = where + channels.at(k);
            const Vec<T> m = load(own + CENTER * L), a = load(own + SCALE * L), b = load(own + SHIFT * L);
            const Vec<T> c = load(own + LEVEL * L);
#pragma GCC unroll 8
            for (long r = 0; r < R; ++r) {
                const long here = at + r * width;
                expect(x + here + ahead);
                expect(grad_y + here + ahead);
                expect(grad_x + here + later);
                channels.put(grad_x + here, a * channels.get(grad_y + here) + (b * (channels.get(x + here) - m) + c));
            }
        }
    };
    if (channels.slots < WIDE) rows.over(n, visit);
    else rows.over<FEWER>(n, visit);
}

template <class S, bool PART> void backward_rows(const Layout& g, const Share& share, const Backward<S>& f) {
    constexpr long L = LANES<Number<S>>;
    const Channels<S, PART> channels(share);
    const long n = g.values();
    Room<Number<S>> room(channels.slots, 0, n);
    const bool near = 3 * n * channels.some * long(sizeof(S)) <= NEAR;
    const long some = AHEAD / long(sizeof(S)), ahead = near ? g.apart : some, later = near ? 0 : some;
    const S *next = near && f.grad_x ? f.grad_x : f.x + some, *other = near && f.grad_x ? f.grad_x : f.grad_y + some;
    for (long ghost = share.first; ghost < share.last; ++ghost) {
        const Rows start(g, ghost);
        for (long k = 0; k < channels.slots; ++k)
            store(room.of(k, CENTER), channels.get(f.mean + ghost * g.channels + channels.at(k)));
        gradient_sums(channels, start, n, f.x, f.grad_y, next, other, room);
        finish(channels, f, ghost * g.channels, n, room);
        if (f.grad_x) write_gradient(channels, start, n, f, room, ahead, later);
        if ((ghost + 1) % share.together && ghost + 1 < g.ghosts) continue;
        for (long k = 0; k < channels.slots; ++k) {
            const long table = ghost / share.together * g.channels + channels.at(k);
            channels.put_wide(f.products + table, room.first + k * L);
            channels.put_wide(f.totals + table, room.second + k * L);
        }
        std::fill(room.first, room.first + 2 * channels.slots * L, 0.0);
    }
}

template <class S> void backward_over(const Layout& g, const Share& share, const Backward<S>& f) {
    if (share.end - share.begin < LANES<Number<S>>) backward_rows<S, true>(g, share, f);
    else backward_rows<S, false>(g, share, f);
}

}  // namespace

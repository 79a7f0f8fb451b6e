// Ghost batch normalization forward and backward, each visiting a ghost's samples once while they lie in a cache.
//
// Samples are in SAMPLES, a floating type, and their channels INSIDE, side by side, or outside. Deviations are taken from a
// rough mean, which needs to be no better than that: what they add up to corrects it. Sums are in the type that samples
// are computed in for a few terms, and in double from there on. What a ghost and a channel give depends on no other, and
// ghosts' sums are added up in an order that does not depend on the number of threads.

#include <algorithm>
#include <vector>

#include "../../threads.h"
#if INSIDE
#include "channels_inside.h"
#else
#include "channels_outside.h"
#endif

namespace {

// Channels of a thread's part are whole groups of vectors; and sums that the gradients of weight and bias are made of.
constexpr long CHANNELS = 64, SUMS = 32;
// Parts for a thread, which others may take.
constexpr long PARTS = 4;
typedef Number<SAMPLES> T;

struct Call {
    Layout layout;
    const SAMPLES *x, *grad_y;
    SAMPLES* out;  // y, or the gradient of x, which may be null
    const T *weight, *bias;
    T *mean, *var, *invstd, *sums;  // sums (2, channels): the gradients of weight and bias
    double eps;
};

// Calls work(share) for the parts of a call, some for each thread: ghosts whose sums are one stay together.
template <class Work> void in_shares(const Layout& g, long together, Work work) {
    const long sums = (g.ghosts + together - 1) / together, groups = std::max(1L, g.channels / CHANNELS);
    const bool of_ghosts = sums >= g.threads;
    const long units = of_ghosts ? sums : groups, parts = std::min(g.threads == 1 ? 1 : PARTS * g.threads, units);
    const long all = of_ghosts ? g.ghosts : g.channels, unit = of_ghosts ? together : CHANNELS;
    in_threads(parts, g.threads, [&](long k) {
        const long from = units * k / parts * unit, to = k + 1 == parts ? all : units * (k + 1) / parts * unit;
        work(of_ghosts ? Share{from, to, 0, g.channels, together} : Share{0, g.ghosts, from, to, together});
    });
}

}  // namespace

extern "C" void forward(const Call* call) {
    const Call& c = *call;
    const Forward<SAMPLES> f{c.x, c.weight, c.bias, c.out, c.mean, c.var, c.invstd, c.eps};
    in_shares(c.layout, 1, [&](const Share& share) { forward_over(c.layout, share, f); });
}

extern "C" void backward(const Call* call) {
    const Call& c = *call;
    const Layout& g = c.layout;
    const long together = (g.ghosts + SUMS - 1) / SUMS, sums = (g.ghosts + together - 1) / together;
    std::vector<double> parts(2 * sums * g.channels);
    double *products = parts.data(), *totals = products + sums * g.channels;
    const Backward<SAMPLES> f{c.x, c.grad_y, c.weight, c.mean, c.invstd, c.out, products, totals};
    in_shares(g, together, [&](const Share& share) { backward_over(g, share, f); });
    for (long which = 0; which < 2; ++which, products = totals)
        for (long k = 0; k < g.channels; ++k) {
            double sum = 0;
            for (long part = 0; part < sums; ++part) sum += products[part * g.channels + k];
            c.sums[which * g.channels + k] = T(sum);
        }
}

// Running statistics after an update by each ghost's in turn, a share of which is kept each time.
extern "C" void average(
    const T* mean, const T* var, long ghosts, long channels, double keep, T* running_mean, T* running_var
) {
    const T kept = T(keep), share = T(1 - keep);
    for (long ghost = 0; ghost < ghosts; ++ghost, mean += channels, var += channels)
        for (long k = 0; k < channels; ++k) {
            running_mean[k] = running_mean[k] * kept + mean[k] * share;
            running_var[k] = running_var[k] * kept + var[k] * share;
        }
}

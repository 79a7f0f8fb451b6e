// Rows in parts, each by a thread.

#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../../../../threads.h"
#include "formula.h"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Rows that are taken together, and after how many of them sums over rows go on in double.
constexpr long ROWS = 4, TERMS = 64;
template <class T> constexpr long WIDTH = VECTOR_BYTES / sizeof(T);

// Calls work(k, first, last) for the k-th part of some rows, each by a thread; parts end where sums go on in double.
template <class Work> void in_parts(long rows, long threads, const Work& work) {
    const long part = std::max(TERMS, ((rows + threads - 1) / threads + TERMS - 1) / TERMS * TERMS);
    in_threads((rows + part - 1) / part, threads, [&](long k) { work(k, k * part, std::min(rows, (k + 1) * part)); });
}

}  // namespace

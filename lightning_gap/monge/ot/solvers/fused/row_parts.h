// Rows in parts, each by a thread.

#pragma once

#include <algorithm>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "formula.h"

namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
// Rows that are taken together, and after how many of them sums over rows go on in double.
constexpr long ROWS = 4, TERMS = 64;
template <class T> constexpr long WIDTH = VECTOR_BYTES / sizeof(T);

// Calls work(k, first, last) for the k-th part of some rows, each by a thread; parts end where sums go on in double.
template <class Work> void in_parts(long rows, long threads, const Work& work) {
    const long part = ((rows + threads - 1) / threads + TERMS - 1) / TERMS * TERMS;
    std::vector<std::thread> others;
    for (long k = 1; k < threads && k * part < rows; ++k)
        try {
            others.emplace_back([&work, k, part, rows] { work(k, k * part, std::min(rows, (k + 1) * part)); });
        } catch (const std::system_error&) {  // no thread is left: this one does it
            work(k, k * part, std::min(rows, (k + 1) * part));
        }
    work(0, 0, std::min(rows, part));
    for (std::thread& other : others) other.join();
}

}  // namespace

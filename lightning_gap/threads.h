// Threads that last as long as a call, so that a fork misses none.

#pragma once

#include <system_error>
#include <thread>
#include <vector>

namespace {

// Calls work(k) for k below a number, each by a thread, the first by this one.
template <class Work> void in_threads(long number, const Work& work) {
    std::vector<std::thread> others;
    for (long k = 1; k < number; ++k)
        try {
            others.emplace_back([&work, k] { work(k); });
        } catch (const std::system_error&) {  // no thread is left: this one does it
            work(k);
        }
    work(0);
    for (std::thread& other : others) other.join();
}

}  // namespace

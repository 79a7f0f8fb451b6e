// Parts of a work by several threads, which wait for the next one; the caller's takes what no other has begun.

#pragma once

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

class Threads {
  public:
    const pid_t process = getpid();

    // Calls call(work, k) for k below a number of parts, by up to so many threads; false where others are at it.
    bool take(long parts, long threads, void (*call)(const void*, long), const void* work) {
        const std::unique_lock<std::mutex> alone(taken, std::try_to_lock);
        if (!alone) return false;
        {
            const std::lock_guard<std::mutex> lock(mutex);
            try {
                for (; waiting < threads - 1; ++waiting) std::thread([this] { wait(); }).detach();
            } catch (const std::system_error&) {  // no more are to be had
            }
            job = {call, work, parts};
            next = 0, ++number, places = threads - 1;
        }
        for (long k = 1; k < threads; ++k) wake.notify_one();
        work_on(job);
        std::unique_lock<std::mutex> lock(mutex);
        places = 0;  // for those that come late
        idle.wait(lock, [this] { return active == 0; });
        if (failed.exchange(false)) throw std::bad_alloc();
        return true;
    }

  private:
    struct Job {
        void (*call)(const void*, long);
        const void* work;
        long parts;
    };
    std::mutex taken, mutex;
    std::condition_variable wake, idle;
    std::atomic<long> next{0};
    std::atomic<bool> failed{false};
    Job job{};
    long waiting = 0, number = 0, active = 0, places = 0;

    // What a part throws, for want of memory, is thrown where all parts were asked for, once no other is at them.
    void work_on(const Job& job) {
        try {
            for (long k = next++; k < job.parts; k = next++) job.call(job.work, k);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        for (long seen = 0;;) {
            wake.wait(lock, [&] { return places > 0 && number != seen; });
            seen = number, ++active, --places;
            const Job own = job;
            lock.unlock();
            work_on(own);
            lock.lock();
            if (--active == 0) idle.notify_one();
        }
    }
};

// Those of this process: a fork has none of its parent's, which are left as they were.
inline Threads& threads_of_process() {
    static std::atomic<Threads*> all{nullptr};
    Threads* found = all.load();
    while (!found || found->process != getpid()) {
        Threads* own = new Threads;
        if (all.compare_exchange_strong(found, own)) return *own;
        delete own;
    }
    return *found;
}

// Calls work(k) for k below a number of parts, by up to so many threads.
template <class Work> void in_threads(long parts, long threads, const Work& work) {
    const auto call = [](const void* own, long k) { (*static_cast<const Work*>(own))(k); };
    if (threads > 1 && parts > 1 && threads_of_process().take(parts, threads < parts ? threads : parts, call, &work)) return;
    for (long k = 0; k < parts; ++k) work(k);
}

}  // namespace

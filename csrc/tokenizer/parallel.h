// Threads that live as long as one call: nothing to re-create after fork, and nothing of OpenMP, which hangs there.
#pragma once

#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace fastbert {

// Runs work(0) … work(count - 1), each once and in this order, on up to `threads` threads, this one included. `work`
// does not throw. A thread that cannot be made is done without.
template <class Work>
void run_on_threads(int64_t count, int64_t threads, const Work& work) {
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t i = next++; i < count; i = next++) work(i);
    };
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads && i < count; ++i) others.emplace_back(take);
    } catch (const std::system_error&) {
    }
    take();
    for (std::thread& other : others) other.join();
}

}  // namespace fastbert

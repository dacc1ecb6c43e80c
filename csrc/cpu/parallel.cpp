#include "parallel.h"

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace fastbert {

#ifdef _OPENMP
namespace {

// A forked child has one thread, but inherits libgomp's belief in a pool: a parallel region would wait for threads that
// are not there.
std::atomic<bool> forked{false};

const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

int range_count(int64_t total, int64_t grain, int threads) {
    const int64_t most = std::min<int64_t>(threads, total / std::max<int64_t>(grain, 1));
    if (most <= 1 || forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
    return static_cast<int>(most);
}

void run_ranges(int64_t total, int ranges, RangeBody body, void* context) {
    if (ranges <= 1) {
        if (total > 0) body(context, 0, total, 0);
        return;
    }
    // The runtime may grant fewer threads than asked for: each then takes several ranges.
#pragma omp parallel for schedule(static) num_threads(ranges)
    for (int range = 0; range < ranges; ++range) {
        const int64_t begin = total * range / ranges;
        const int64_t end = total * (range + 1) / ranges;
        if (begin < end) body(context, begin, end, range);
    }
}

#else  // no OpenMP (Apple's compiler): serial

int range_count(int64_t, int64_t, int) {
    return 1;
}

void run_ranges(int64_t total, int, RangeBody body, void* context) {
    if (total > 0) body(context, 0, total, 0);
}

#endif

}  // namespace fastbert

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#endif

namespace fastbert {

#ifdef _OPENMP
namespace {

// A forked child has one thread, but inherits libgomp's belief in a pool: a parallel region would wait for threads that
// are not there.
std::atomic<bool> forked{false};

const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

// Waiting without sleep: to be woken costs tens of microseconds, more than many a range. Who waits for long lets others
// have the core.
class Patience {
  public:
    void wait() {
        if (++rounds_ < kRounds) {
#if defined(__x86_64__)
            _mm_pause();
#endif
        } else {
            sched_yield();
        }
    }

  private:
    static constexpr int kRounds = 2000;
    int rounds_ = 0;
};

void run_range(int64_t total, int ranges, int range, RangeBody body, void* context) {
    const int64_t begin = total * range / ranges;
    const int64_t end = total * (range + 1) / ranges;
    if (begin < end) body(context, begin, end, range);
}

// Threads of one parallel region: a leader, who publishes a job at a time, and others, who take ranges of it.
class Team {
  public:
    explicit Team(int threads) : threads_(threads) {}

    int threads() const { return threads_; }

    void run(int64_t total, int ranges, RangeBody body, void* context) {
        job_ = {total, ranges, body, context};
        unfinished_.store(ranges, std::memory_order_relaxed);
        const uint64_t number = (open_.load(std::memory_order_relaxed) >> 32) + 1;
        open_.store(number << 32 | static_cast<uint32_t>(ranges), std::memory_order_release);
        while (take()) {
        }
        Patience patience;
        while (unfinished_.load(std::memory_order_acquire)) patience.wait();
    }

    void work() {
        Patience patience;
        while (!closed_.load(std::memory_order_acquire)) {
            if (take()) {
                patience = {};
            } else {
                patience.wait();
            }
        }
    }

    void close() { closed_.store(true, std::memory_order_release); }

  private:
    struct Job {
        int64_t total;
        int ranges;
        RangeBody body;
        void* context;
    };

    // Runs one range that nobody has taken; false if there is none.
    bool take() {
        uint64_t open = open_.load(std::memory_order_acquire);
        do {
            if (static_cast<uint32_t>(open) == 0) return false;
        } while (!open_.compare_exchange_weak(open, open - 1, std::memory_order_acquire));
        // The job stays what it is until this range is done.
        const Job job = job_;
        run_range(job.total, job.ranges, job.ranges - static_cast<int>(static_cast<uint32_t>(open)), job.body,
                  job.context);
        unfinished_.fetch_sub(1, std::memory_order_release);
        return true;
    }

    // Apart in the cache: all watch open_, and only the leader the other.
    alignas(64) std::atomic<uint64_t> open_{0};  // the job's number, and how many of its ranges nobody has taken
    alignas(64) std::atomic<int> unfinished_{0};
    alignas(64) Job job_ = {};
    std::atomic<bool> closed_{false};
    const int threads_;
};

thread_local Team* current_team = nullptr;  // of a leader outside his ranges

struct Leading {
    explicit Leading(Team* team) : before(current_team) { current_team = team; }
    ~Leading() { current_team = before; }
    Team* const before;
};

}  // namespace

int range_count(int64_t total, int64_t grain, int threads) {
    const int64_t most = std::min<int64_t>(threads, total / std::max<int64_t>(grain, 1));
    if (most <= 1 || forked.load(std::memory_order_relaxed)) return 1;
    if (current_team) return static_cast<int>(std::min<int64_t>(most, current_team->threads()));
    return omp_in_parallel() ? 1 : static_cast<int>(most);
}

void run_ranges(int64_t total, int ranges, RangeBody body, void* context) {
    if (ranges <= 1) {
        if (total > 0) body(context, 0, total, 0);
        return;
    }
    if (Team* const team = current_team) {
        const Leading nobody(nullptr);  // within a range its thread is alone
        team->run(total, ranges, body, context);
        return;
    }
    // The runtime may grant fewer threads than asked for: each then takes several ranges.
#pragma omp parallel for schedule(static) num_threads(ranges)
    for (int range = 0; range < ranges; ++range) run_range(total, ranges, range, body, context);
}

void run_team(int threads, TeamBody body, void* context) {
    if (threads <= 1 || current_team || forked.load(std::memory_order_relaxed) || omp_in_parallel()) {
        body(context);
        return;
    }
    Team team(threads);
    std::exception_ptr thrown;  // none may leave a parallel region
#pragma omp parallel num_threads(threads)
    {
        if (omp_get_thread_num() == 0) {
            try {
                const Leading leading(&team);
                body(context);
            } catch (...) {
                thrown = std::current_exception();
            }
            team.close();
        } else {
            team.work();
        }
    }
    if (thrown) std::rethrow_exception(thrown);
}

#else  // no OpenMP (Apple's compiler): serial

int range_count(int64_t, int64_t, int) {
    return 1;
}

void run_ranges(int64_t total, int, RangeBody body, void* context) {
    if (total > 0) body(context, 0, total, 0);
}

void run_team(int, TeamBody body, void* context) {
    body(context);
}

#endif

}  // namespace fastbert

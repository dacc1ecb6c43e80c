// Rows shared out among threads.
#pragma once

#include <stdint.h>

namespace fastbert {

// How many ranges parallel_for will make of `total` items when none may be smaller than `grain` and no more than
// `threads` may run. One in a forked child and inside a parallel region.
int range_count(int64_t total, int64_t grain, int threads);

// Calls body(context, begin, end, range) for `ranges` contiguous ranges that cover [0, total) in order, each on one
// thread, the calling one among them. `body` must not throw.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end, int range);
void run_ranges(int64_t total, int ranges, RangeBody body, void* context);

template <class Body>
void parallel_for(int64_t total, int ranges, const Body& body) {
    run_ranges(
        total, ranges,
        [](void* context, int64_t begin, int64_t end, int range) {
            (*static_cast<const Body*>(context))(begin, end, range);
        },
        const_cast<Body*>(&body));
}

// Calls body(context) with `threads` - 1 threads at hand that wait, awake, for every parallel_for within it: for a
// sequence of short ones. One that comes late is not waited for: the others take its ranges. What body throws is passed
// on.
using TeamBody = void (*)(void* context);
void run_team(int threads, TeamBody body, void* context);

template <class Body>
void with_team(int threads, const Body& body) {
    run_team(threads, [](void* context) { (*static_cast<const Body*>(context))(); }, const_cast<Body*>(&body));
}

}  // namespace fastbert

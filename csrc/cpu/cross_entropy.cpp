#include "cross_entropy.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(CrossEntropyKernels, cross_entropy_kernels)

namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 8192;

int64_t grain(int64_t classes) {
    return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, classes));
}

}  // namespace

void cross_entropy(Dtype dtype, const CrossEntropy& a, int threads) {
    const auto forward = current_cross_entropy_kernels().forward[dtype];
    parallel_for(a.rows, range_count(a.rows, grain(a.classes), threads),
                 [&](int64_t begin, int64_t end, int) { forward(a, begin, end); });
}

void cross_entropy_backward(Dtype dtype, CrossEntropyBackward a, int threads) {
    // In place the lines are in the caches already.
    a.stream = a.dlogits != a.logits && is_large(a.rows * a.classes * dtype_bytes(dtype));
    const auto backward = current_cross_entropy_kernels().backward[dtype];
    parallel_for(a.rows, range_count(a.rows, grain(a.classes), threads),
                 [&](int64_t begin, int64_t end, int) { backward(a, begin, end); });
}

}  // namespace fastbert

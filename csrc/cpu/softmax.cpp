#include "softmax.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(SoftmaxKernels, softmax_kernels)

namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 8192;

int64_t grain(int64_t columns) {
    return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns));
}

}  // namespace

void softmax(Dtype dtype, Softmax a, int threads) {
    if (a.columns == 0) return;
    const int ranges = range_count(a.rows, grain(a.columns), threads);
    const int64_t scratch_floats = 2 * padded_width(a.columns);
    Workspace workspace(ranges * scratch_floats);
    float* const scratch = workspace.take(ranges * scratch_floats);
    const int64_t row_bytes = a.columns * dtype_bytes(dtype);
    a.stream = streams(a.y, a.rows * row_bytes, row_bytes);
    const auto forward = current_softmax_kernels().forward[dtype];
    parallel_for(a.rows, ranges, [&](int64_t begin, int64_t end, int range) {
        forward(a, begin, end, scratch + range * scratch_floats);
    });
}

void softmax_backward(Dtype dtype, SoftmaxBackward a, int threads) {
    const int64_t row_bytes = a.columns * dtype_bytes(dtype);
    a.stream = streams(a.dx, a.rows * row_bytes, row_bytes);
    const auto backward = current_softmax_kernels().backward[dtype];
    parallel_for(a.rows, range_count(a.rows, grain(a.columns), threads),
                 [&](int64_t begin, int64_t end, int) { backward(a, begin, end); });
}

}  // namespace fastbert

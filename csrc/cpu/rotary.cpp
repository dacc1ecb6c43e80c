#include "rotary.h"

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(RotaryKernels, rotary_kernels)

void rotary(Dtype dtype, const Rotary& a, int threads) {
    const int64_t tokens = a.batch * a.seq;
    const int ranges = range_count(tokens, grain_rows(a.heads * a.head_dim), threads);
    const int64_t scratch_floats = 4 * padded_width(2 * a.pairs);
    Workspace workspace(ranges * scratch_floats);
    float* const scratch = workspace.take(ranges * scratch_floats);
    const auto forward = current_rotary_kernels().forward[dtype];
    parallel_for(tokens, ranges, [&](int64_t begin, int64_t end, int range) {
        forward(a, begin, end, scratch + range * scratch_floats);
    });
}

}  // namespace fastbert

#include "rms_norm.h"

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(RmsNormKernels, rms_norm_kernels)

void rms_norm(Dtype dtype, RmsNormForward a, Parameter weight, int threads) {
    Workspace workspace(room_for(weight, dtype, a.width));
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    const auto forward = current_rms_norm_kernels().forward[dtype];
    parallel_for(a.rows, range_count(a.rows, grain_rows(a.width), threads),
                 [&](int64_t begin, int64_t end, int) { forward(a, begin, end); });
}

void rms_norm_backward(Dtype dtype, RmsNormBackward a, Parameter weight, int threads) {
    const RowSums row_sums(dtype, a.rows, a.width);
    float* const dweight = a.dweight;
    const int sums = dweight ? 1 : 0;
    Workspace workspace(room_for(weight, dtype, a.width) + row_sums.room(sums));
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    float* const partials = workspace.take(row_sums.room(sums));
    const auto backward = current_rms_norm_kernels().backward[dtype];
    parallel_for(row_sums.blocks(), row_sums.ranges(threads), [&](int64_t begin, int64_t end, int) {
        for (int64_t block = begin; block < end; ++block) {
            RmsNormBackward part = a;
            part.dweight = sums ? row_sums.clear(partials, sums, block) : nullptr;
            backward(part, row_sums.block_begin(block), row_sums.block_end(block));
        }
    });
    if (dweight) row_sums.finish(partials, sums, 0, dweight, threads);
}

}  // namespace fastbert

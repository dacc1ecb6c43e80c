#include "layer_norm.h"

#include <algorithm>
#include <memory>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(LayerNormKernels, layer_norm_kernels)

namespace {

// The next layer reads y at once, but the sum only after its products (pre-norm) or in the backward pass.
bool streams_sum(const AddLayerNormForward& a, Dtype dtype) {
    const int64_t row_bytes = a.width * (dtype == kFloat32 ? 4 : 2);
    return streams(a.sum, a.rows * row_bytes, row_bytes);
}

}  // namespace

void layer_norm(Dtype dtype, LayerNormForward a, Parameter weight, Parameter bias, int threads) {
    const LayerNormKernels& kernels = current_layer_norm_kernels();
    Workspace workspace(room_for(weight, dtype, a.width) + room_for(bias, dtype, a.width));
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    a.bias = prepare(bias, 0.0f, dtype, a.width, workspace);
    const auto forward = kernels.forward[dtype];
    parallel_for(a.rows, range_count(a.rows, grain_rows(a.width), threads),
                 [&](int64_t begin, int64_t end, int) { forward(a, begin, end); });
}

void add_layer_norm(Dtype dtype, AddLayerNormForward a, Parameter x_bias, Parameter weight, Parameter bias,
                    int threads) {
    const LayerNormKernels& kernels = current_layer_norm_kernels();
    const int ranges = range_count(a.rows, grain_rows(a.width), threads);
    const int64_t scratch_floats = 3 * padded_width(a.width);
    Workspace workspace(room_for(x_bias, dtype, a.width) + room_for(weight, dtype, a.width) +
                        room_for(bias, dtype, a.width) + ranges * scratch_floats);
    a.x_bias = x_bias.data ? prepare(x_bias, 0.0f, dtype, a.width, workspace) : nullptr;
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    a.bias = prepare(bias, 0.0f, dtype, a.width, workspace);
    float* const scratch = workspace.take(ranges * scratch_floats);
    a.stream_sum = streams_sum(a, dtype);
    const auto forward = kernels.add_forward[dtype];
    parallel_for(a.rows, ranges, [&](int64_t begin, int64_t end, int range) {
        forward(a, begin, end, scratch + range * scratch_floats);
    });
}

void add_layer_norm_backward(Dtype dtype, AddLayerNormBackward a, Parameter weight, int threads) {
    const RowSums row_sums(dtype, a.rows, a.width);
    const int ranges = row_sums.ranges(threads);

    const int64_t stride = padded_width(a.width);
    float* const results[] = {a.dweight, a.dbias, a.dx_bias};
    const bool wanted[] = {a.dweight || a.dbias, a.dweight || a.dbias, a.dx_bias != nullptr};
    const int sums = wanted[0] + wanted[1] + wanted[2];
    const int64_t scratch_floats = a.dropout.on ? kMostRows * stride : 0;
    Workspace workspace(room_for(weight, dtype, a.width) + ranges * scratch_floats + row_sums.room(sums));
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    float* const scratch = workspace.take(ranges * scratch_floats);
    float* const partials = workspace.take(row_sums.room(sums));

    const auto backward = current_layer_norm_kernels().add_backward[dtype];
    parallel_for(row_sums.blocks(), ranges, [&](int64_t begin, int64_t end, int range) {
        for (int64_t block = begin; block < end; ++block) {
            AddLayerNormBackward part = a;
            float* next = row_sums.clear(partials, sums, block);
            part.dweight = wanted[0] ? next : nullptr;
            part.dbias = wanted[1] ? next + stride : nullptr;
            part.dx_bias = wanted[2] ? next + (sums - 1) * stride : nullptr;
            backward(part, row_sums.block_begin(block), row_sums.block_end(block), scratch + range * scratch_floats);
        }
    });
    int index = 0;
    for (int i = 0; i < 3; ++i) {
        if (!wanted[i]) continue;
        if (results[i]) row_sums.finish(partials, sums, index, results[i], threads);
        ++index;
    }
}

void philox_stream(uint64_t seed, uint64_t offset, int64_t count, uint32_t* words) {
    const LayerNormKernels& kernels = current_layer_norm_kernels();
    const int64_t block = kernels.philox_block, blocks = (count + block - 1) / block;
    std::unique_ptr<uint32_t[]> padded(new uint32_t[static_cast<size_t>(blocks * block)]);
    kernels.philox(seed, offset / 4, blocks, padded.get());
    std::copy_n(padded.get(), count, words);
}

}  // namespace fastbert

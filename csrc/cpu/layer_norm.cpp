#include "layer_norm.h"

#include <string.h>

#include <algorithm>
#include <memory>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(LayerNormKernels, layer_norm_kernels)

namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;

// Rows of a partial sum of dweight, dbias and dx_bias. It depends on the number of rows alone, never on the threads:
// so the sums are the same bit for bit for any number of threads.
constexpr int64_t kLeastBlockRows = 32;
constexpr int64_t kMostBlocks = 128;

// Bytes of a sum from which it is written past the caches. The next layer reads y at once, but the sum only after its
// products (pre-norm) or in the backward pass. On 2048 x 768 float32 that is 6 MiB.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kStreamAlignment = 64;

bool streams(const void* sum, Dtype dtype, int64_t rows, int64_t width) {
    const int64_t row_bytes = width * (dtype == kFloat32 ? 4 : 2);
    return sum && rows * row_bytes >= kStreamBytes && row_bytes % kStreamAlignment == 0 &&
           reinterpret_cast<uintptr_t>(sum) % kStreamAlignment == 0;
}

int64_t grain_rows(int64_t width) {
    return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

// Uninitialised floats of one call. Every piece starts at a cache line, for a vector that crosses one costs twice.
class Workspace {
  public:
    explicit Workspace(int64_t floats)
        : data_(floats ? new float[static_cast<size_t>(floats + kLineFloats)] : nullptr), next_(data_.get()) {
        while (reinterpret_cast<uintptr_t>(next_) % (kLineFloats * sizeof(float))) ++next_;
    }
    float* take(int64_t floats) {  // a multiple of kPadding
        float* taken = next_;
        next_ += floats;
        return taken;
    }

  private:
    static constexpr int64_t kLineFloats = 16;
    std::unique_ptr<float[]> data_;
    float* next_;
};

// float32 vectors of float32 rows are read where they are.
bool is_ready(const Parameter& parameter, Dtype rows) {
    return parameter.data && parameter.dtype == kFloat32 && rows == kFloat32;
}

// Kernels read parameters as float32 in block order: converted here where they are not, filled in where they are
// absent.
const float* prepare(const LayerNormKernels& kernels, const Parameter& parameter, float absent, Dtype rows,
                     int64_t width, Workspace& workspace) {
    if (is_ready(parameter, rows)) return static_cast<const float*>(parameter.data);
    float* floats = workspace.take(padded_width(width));
    if (parameter.data) {
        kernels.to_block_order[rows](parameter.data, parameter.dtype, floats, width);
    } else {
        std::fill_n(floats, width, absent);
    }
    return floats;
}

int64_t room_for(const Parameter& parameter, Dtype rows, int64_t width) {
    return is_ready(parameter, rows) ? 0 : padded_width(width);
}

}  // namespace

void layer_norm(Dtype dtype, LayerNormForward a, Parameter weight, Parameter bias, int threads) {
    const LayerNormKernels& kernels = current_layer_norm_kernels();
    Workspace workspace(room_for(weight, dtype, a.width) + room_for(bias, dtype, a.width));
    a.weight = prepare(kernels, weight, 1.0f, dtype, a.width, workspace);
    a.bias = prepare(kernels, bias, 0.0f, dtype, a.width, workspace);
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
    a.x_bias = x_bias.data ? prepare(kernels, x_bias, 0.0f, dtype, a.width, workspace) : nullptr;
    a.weight = prepare(kernels, weight, 1.0f, dtype, a.width, workspace);
    a.bias = prepare(kernels, bias, 0.0f, dtype, a.width, workspace);
    float* const scratch = workspace.take(ranges * scratch_floats);
    a.stream_sum = streams(a.sum, dtype, a.rows, a.width);
    const auto forward = kernels.add_forward[dtype];
    parallel_for(a.rows, ranges, [&](int64_t begin, int64_t end, int range) {
        forward(a, begin, end, scratch + range * scratch_floats);
    });
}

void add_layer_norm_backward(Dtype dtype, AddLayerNormBackward a, Parameter weight, int threads) {
    const LayerNormKernels& kernels = current_layer_norm_kernels();
    const int64_t width = a.width, stride = padded_width(width);
    const int64_t block_rows = std::max(kLeastBlockRows, (a.rows + kMostBlocks - 1) / kMostBlocks);
    const int64_t blocks = (a.rows + block_rows - 1) / block_rows;
    const int ranges = range_count(blocks, (grain_rows(width) + block_rows - 1) / block_rows, threads);

    float* const results[] = {a.dweight, a.dbias, a.dx_bias};
    const bool wanted[] = {a.dweight || a.dbias, a.dweight || a.dbias, a.dx_bias != nullptr};
    const int sums = wanted[0] + wanted[1] + wanted[2];
    const int64_t scratch_floats = a.dropout.on ? kMostRows * stride : 0;
    Workspace workspace(room_for(weight, dtype, width) + ranges * scratch_floats + blocks * sums * stride);
    a.weight = prepare(kernels, weight, 1.0f, dtype, width, workspace);
    float* const scratch = workspace.take(ranges * scratch_floats);
    float* const partials = workspace.take(blocks * sums * stride);  // [blocks, sums, stride]

    const auto backward = kernels.add_backward[dtype];
    parallel_for(blocks, ranges, [&](int64_t begin, int64_t end, int range) {
        for (int64_t block = begin; block < end; ++block) {
            AddLayerNormBackward part = a;
            float* next = partials + block * sums * stride;
            if (sums) memset(next, 0, static_cast<size_t>(sums * stride) * sizeof(float));
            part.dweight = wanted[0] ? next : nullptr;
            part.dbias = wanted[1] ? next + stride : nullptr;
            part.dx_bias = wanted[2] ? next + (sums - 1) * stride : nullptr;
            backward(part, block * block_rows, std::min((block + 1) * block_rows, a.rows),
                     scratch + range * scratch_floats);
        }
    });

    const int64_t part_grain = kGrainElements / kPadding / std::max<int64_t>(1, blocks);
    int index = 0;
    for (int i = 0; i < 3; ++i) {
        if (!wanted[i]) continue;
        float* const from = partials + index++ * stride;
        if (!results[i]) continue;
        if (blocks == 0) {
            std::fill_n(results[i], width, 0.0f);
            continue;
        }
        // Parts are whole blocks, so that from_block_order finds in a part what sum_rows put there.
        const int64_t parts = stride / kPadding;
        parallel_for(parts, range_count(parts, part_grain, threads), [&](int64_t begin, int64_t end, int) {
            begin *= kPadding;
            end = std::min(end * kPadding, width);
            kernels.sum_rows(from, blocks, sums * stride, begin, end);
            kernels.from_block_order[dtype](from, results[i], begin, end, width);
        });
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

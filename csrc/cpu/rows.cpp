#include "rows.h"

#include <string.h>

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(RowKernels, row_kernels)

namespace {

constexpr int64_t kGrainElements = 32768;
constexpr int64_t kLineFloats = 16;

constexpr int64_t kLeastBlockRows = 32;
constexpr int64_t kMostBlocks = 128;

// Bytes from which a result that is not read at once is better off in memory: 6 MiB are 2048 x 768 float32.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kStreamAlignment = 64;

// float32 vectors of float32 rows are read where they are.
bool is_ready(const Parameter& parameter, Dtype rows) {
    return parameter.data && parameter.dtype == kFloat32 && rows == kFloat32;
}

}  // namespace

Workspace::Workspace(int64_t floats)
    : data_(floats ? new float[static_cast<size_t>(floats + kLineFloats)] : nullptr), next_(data_) {
    while (reinterpret_cast<uintptr_t>(next_) % (kLineFloats * sizeof(float))) ++next_;
}

Workspace::~Workspace() {
    delete[] data_;
}

float* Workspace::take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
}

const float* prepare(const Parameter& parameter, float absent, Dtype rows, int64_t width, Workspace& workspace) {
    if (is_ready(parameter, rows)) return static_cast<const float*>(parameter.data);
    float* floats = workspace.take(padded_width(width));
    if (parameter.data) {
        current_row_kernels().to_block_order[rows](parameter.data, parameter.dtype, floats, width);
    } else {
        std::fill_n(floats, width, absent);
    }
    return floats;
}

int64_t room_for(const Parameter& parameter, Dtype rows, int64_t width) {
    return is_ready(parameter, rows) ? 0 : padded_width(width);
}

int64_t grain_rows(int64_t width) {
    return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

bool is_large(int64_t bytes) {
    return bytes >= kStreamBytes;
}

bool streams(const void* result, int64_t bytes, int64_t row_bytes) {
    return result && is_large(bytes) && row_bytes % kStreamAlignment == 0 &&
           reinterpret_cast<uintptr_t>(result) % kStreamAlignment == 0;
}

RowSums::RowSums(Dtype dtype, int64_t rows, int64_t width)
    : dtype_(dtype),
      rows_(rows),
      width_(width),
      block_rows_(std::max(kLeastBlockRows, (rows + kMostBlocks - 1) / kMostBlocks)),
      blocks_((rows + block_rows_ - 1) / block_rows_) {}

int64_t RowSums::block_end(int64_t block) const {
    return std::min((block + 1) * block_rows_, rows_);
}

int RowSums::ranges(int threads) const {
    return range_count(blocks_, (grain_rows(width_) + block_rows_ - 1) / block_rows_, threads);
}

int64_t RowSums::room(int sums) const {
    return blocks_ * sums * padded_width(width_);
}

float* RowSums::clear(float* partials, int sums, int64_t block) const {
    const int64_t floats = sums * padded_width(width_);
    float* const first = partials + block * floats;
    if (floats) memset(first, 0, static_cast<size_t>(floats) * sizeof(float));
    return first;
}

void RowSums::finish(float* partials, int sums, int index, float* result, int threads) const {
    if (blocks_ == 0) {
        std::fill_n(result, width_, 0.0f);
        return;
    }
    const RowKernels& kernels = current_row_kernels();
    const int64_t stride = padded_width(width_);
    float* const from = partials + index * stride;
    // Parts are whole blocks of columns, so that from_block_order finds in a part what sum_rows put there.
    const int64_t parts = stride / kPadding;
    const int64_t grain = kGrainElements / kPadding / blocks_;
    parallel_for(parts, range_count(parts, grain, threads), [&](int64_t begin, int64_t end, int) {
        begin *= kPadding;
        end = std::min(end * kPadding, width_);
        kernels.sum_rows(from, blocks_, sums * stride, begin, end);
        kernels.from_block_order[dtype_](from, result, begin, end, width_);
    });
}

}  // namespace fastbert

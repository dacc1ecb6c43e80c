#include "gelu.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(GeluKernels, gelu_kernels)

namespace {

// Elements below which another thread costs more than it saves, and into which rows without a bias are cut. Some twenty
// instructions an element make it fewer than for a norm.
constexpr int64_t kPiece = 8192;

int64_t grain(int64_t width) {
    return std::max<int64_t>(1, kPiece / std::max<int64_t>(1, width));
}

}  // namespace

void bias_gelu(Dtype dtype, Activation gelu, int64_t rows, int64_t width, const void* x, int64_t x_stride,
               Parameter bias, void* y, int threads) {
    const auto forward = current_gelu_kernels().forward[dtype][gelu];
    const int64_t bytes = dtype_bytes(dtype);
    const char* const from = static_cast<const char*>(x);
    char* const to = static_cast<char*>(y);
    if (!bias.data && x_stride == width) {
        const int64_t total = rows * width, pieces = (total + kPiece - 1) / kPiece;
        parallel_for(pieces, range_count(pieces, 1, threads), [&](int64_t begin, int64_t end, int) {
            begin *= kPiece;
            forward(from + begin * bytes, nullptr, to + begin * bytes, std::min(end * kPiece, total) - begin);
        });
        return;
    }
    Workspace workspace(bias.data ? room_for(bias, dtype, width) : 0);
    const float* const ready = bias.data ? prepare(bias, 0.0f, dtype, width, workspace) : nullptr;
    parallel_for(rows, range_count(rows, grain(width), threads), [&](int64_t begin, int64_t end, int) {
        for (int64_t row = begin; row < end; ++row) {
            forward(from + row * x_stride * bytes, ready, to + row * width * bytes, width);
        }
    });
}

void bias_gelu_backward(Dtype dtype, Activation gelu, int64_t rows, int64_t width, const void* grad_y,
                        int64_t grad_y_stride, const void* x, int64_t x_stride, Parameter bias, void* dx, float* dbias,
                        int threads) {
    const auto backward = current_gelu_kernels().backward[dtype][gelu];
    const int64_t bytes = dtype_bytes(dtype);
    const RowSums row_sums(dtype, rows, width);
    const int sums = dbias ? 1 : 0;
    Workspace workspace((bias.data ? room_for(bias, dtype, width) : 0) + row_sums.room(sums));
    const float* const ready = bias.data ? prepare(bias, 0.0f, dtype, width, workspace) : nullptr;
    float* const partials = workspace.take(row_sums.room(sums));
    const auto one_row = [&](int64_t row, float* partial) {
        backward(static_cast<const char*>(grad_y) + row * grad_y_stride * bytes,
                 static_cast<const char*>(x) + row * x_stride * bytes, ready,
                 dx ? static_cast<char*>(dx) + row * width * bytes : nullptr, partial, width);
    };
    if (!dbias) {
        parallel_for(rows, range_count(rows, grain(width), threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t row = begin; row < end; ++row) one_row(row, nullptr);
        });
        return;
    }
    parallel_for(row_sums.blocks(), row_sums.ranges(threads), [&](int64_t begin, int64_t end, int) {
        for (int64_t block = begin; block < end; ++block) {
            float* const partial = row_sums.clear(partials, sums, block);
            for (int64_t row = row_sums.block_begin(block); row < row_sums.block_end(block); ++row) {
                one_row(row, partial);
            }
        }
    });
    row_sums.finish(partials, sums, 0, dbias, threads);
}

}  // namespace fastbert

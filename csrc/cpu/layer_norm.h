// Layer norm, alone and behind bias, dropout and residual: arguments and kernels. No standard library header here: the
// kernel files are compiled once for each instruction set (see simd.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace fastbert {

// Matrices have `rows` rows of `width` elements; a stride is the distance of rows in elements. Pointers may be null
// where it says so.
struct LayerNormForward {
    int64_t rows, width;
    const void* x;
    int64_t x_stride;
    const float* weight;
    const float* bias;
    float eps;
    void* y;      // contiguous
    float* mean;  // null: not wanted, and then neither is rstd
    float* rstd;
};

struct AddLayerNormForward {
    int64_t rows, width;
    const void* x;
    int64_t x_stride;
    const void* residual;
    int64_t residual_stride;
    const float* x_bias;  // or null
    const float* weight;
    const float* bias;
    float eps;
    Dropout dropout;
    void* y;          // contiguous
    void* sum;        // contiguous; null: not wanted
    bool stream_sum;  // write it past the caches; its rows are then aligned to 64 bytes
    float* mean;      // null: not wanted, and then neither is rstd
    float* rstd;
};

// Also layer norm without addition: then there is no grad_sum, no dx and no dx_bias, and dresidual is the gradient of
// x.
struct AddLayerNormBackward {
    int64_t rows, width;
    const void* grad_y;
    int64_t grad_y_stride;
    const void* grad_sum;  // or null
    int64_t grad_sum_stride;
    const void* sum;
    int64_t sum_stride;
    const float* mean;
    const float* rstd;
    const float* weight;
    Dropout dropout;
    void* dx;         // contiguous; null: not wanted
    void* dresidual;  // contiguous; null: not wanted
    // Sums over the rows, each [width]; a kernel adds to what is there. Null: not wanted.
    float* dx_bias;
    float* dweight;  // null: not wanted, and then neither is dbias
    float* dbias;
};

// Rows that a kernel keeps in flight at most.
constexpr int kMostRows = 4;

// Vectors in scratch memory are padded to whole blocks (see simd.h) of the widest instruction set.
constexpr int64_t kPadding = 32;

static inline int64_t padded_width(int64_t width) {
    return (width + kPadding - 1) / kPadding * kPadding;
}

// Kernels run on rows [begin, end) and on one thread. All float32 vectors [width] that belong to rows of one dtype are
// in that dtype's block order (see simd.h).
struct LayerNormKernels {
    // Adds rows 1 … rows - 1 of `data` to row 0, in columns [begin, end).
    void (*sum_rows)(float* data, int64_t rows, int64_t stride, int64_t begin, int64_t end);
    // Words of `blocks` blocks of `philox_block` stream indices each, the first being 4 * counter.
    void (*philox)(uint64_t seed, uint64_t counter, int64_t blocks, uint32_t* words);
    int philox_block;

    // A vector of either dtype to float32 in block order; back, the columns [begin, end).
    void (*to_block_order[kDtypes])(const void* from, Dtype from_dtype, float* to, int64_t width);
    void (*from_block_order[kDtypes])(const float* from, float* to, int64_t begin, int64_t end, int64_t width);

    void (*forward[kDtypes])(const LayerNormForward&, int64_t begin, int64_t end);
    // scratch: 3 * padded_width(width)
    void (*add_forward[kDtypes])(const AddLayerNormForward&, int64_t begin, int64_t end, float* scratch);
    // scratch: kMostRows * padded_width(width), and only read with dropout
    void (*add_backward[kDtypes])(const AddLayerNormBackward&, int64_t begin, int64_t end, float* scratch);
};

// The drivers: threads, workspaces, weights of either dtype.
struct Parameter {
    const void* data;  // [width]; null: absent
    Dtype dtype;
};

#ifndef FASTBERT_ISA
void layer_norm(Dtype dtype, LayerNormForward a, Parameter weight, Parameter bias, int threads);
void add_layer_norm(Dtype dtype, AddLayerNormForward a, Parameter x_bias, Parameter weight, Parameter bias,
                    int threads);
// dx_bias, dweight and dbias of `a` are the results [width].
void add_layer_norm_backward(Dtype dtype, AddLayerNormBackward a, Parameter weight, int threads);
// `count` words of the dropout stream from index `offset` (a multiple of 4) on.
void philox_stream(uint64_t seed, uint64_t offset, int64_t count, uint32_t* words);
#endif

}  // namespace fastbert

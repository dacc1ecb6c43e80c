// Softmax with its scale, mask and causality: arguments and kernels. No standard library header here: the kernel files
// are compiled once for each instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

// What a mask holds: bytes, not 0 where an element is kept; or terms that are added.
enum MaskType : int { kUnmasked = 0, kKeepMask = 1, kFloat32Mask = 2, kBfloat16Mask = 3 };

constexpr int kMostMaskDims = 16;

// Of each row of a tensor [..., columns], where the mask that is broadcast to it has its row.
struct BroadcastMask {
    const void* data;
    MaskType type;
    int dims;                        // leading dimensions
    int64_t sizes[kMostMaskDims];    // of the tensor
    int64_t strides[kMostMaskDims];  // of the mask, in elements; 0 where it is broadcast
};

// Strides are the distance of rows in elements; y and dx are contiguous.
struct Softmax {
    int64_t rows, columns;
    const void* x;
    int64_t x_stride;
    float scale;
    BroadcastMask mask;
    int64_t causal_rows;  // of each matrix, whose row i keeps the columns j <= i; 0: not causal
    void* y;
    bool stream;  // write y past the caches
};

struct SoftmaxBackward {
    int64_t rows, columns;
    const void* grad_y;
    int64_t grad_y_stride;
    const void* y;
    int64_t y_stride;
    float scale;
    void* dx;
    bool stream;  // write dx past the caches
};

// Kernels run on rows [begin, end) and on one thread.
struct SoftmaxKernels {
    void (*forward[kDtypes])(const Softmax&, int64_t begin, int64_t end, float* scratch);  // 2 * padded_width(columns)
    void (*backward[kDtypes])(const SoftmaxBackward&, int64_t begin, int64_t end);
};

#ifndef FASTBERT_ISA
void softmax(Dtype dtype, Softmax a, int threads);
void softmax_backward(Dtype dtype, SoftmaxBackward a, int threads);
#endif

}  // namespace fastbert

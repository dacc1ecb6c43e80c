// RMS norm: arguments and kernels. No standard library header here: the kernel files are compiled once for each
// instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

// Rows of `width` elements; a stride is the distance of rows in elements. Vectors of float32 are in the rows' block
// order.
struct RmsNormForward {
    int64_t rows, width;
    const void* x;
    int64_t x_stride;
    const float* weight;
    float eps;
    void* y;      // contiguous
    float* rstd;  // null: not wanted
};

struct RmsNormBackward {
    int64_t rows, width;
    const void* grad_y;
    int64_t grad_y_stride;
    const void* x;
    int64_t x_stride;
    const float* rstd;
    const float* weight;
    void* dx;        // contiguous; null: not wanted
    float* dweight;  // [width]; a kernel adds to what is there; null: not wanted
};

// Kernels run on rows [begin, end) and on one thread.
struct RmsNormKernels {
    void (*forward[kDtypes])(const RmsNormForward&, int64_t begin, int64_t end);
    void (*backward[kDtypes])(const RmsNormBackward&, int64_t begin, int64_t end);
};

#ifndef FASTBERT_ISA
void rms_norm(Dtype dtype, RmsNormForward a, Parameter weight, int threads);
void rms_norm_backward(Dtype dtype, RmsNormBackward a, Parameter weight, int threads);
#endif

}  // namespace fastbert

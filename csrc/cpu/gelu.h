// GELU behind a bias: arguments and kernels. No standard library header here: the kernel files are compiled once for
// each instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

constexpr int kGelus = 3;  // the first ones of the activations

// Kernels work on one row of `width` elements; the vectors of float32 are in the row's block order (see simd.h).
struct GeluKernels {
    void (*forward[kDtypes][kGelus])(const void* x, const float* bias, void* y, int64_t width);  // bias: or null
    // dx and dbias may be null; a kernel adds to what is in dbias.
    void (*backward[kDtypes][kGelus])(const void* grad_y, const void* x, const float* bias, void* dx, float* dbias,
                                      int64_t width);
};

#ifndef FASTBERT_ISA
// Matrices have `rows` rows of `width` elements; a stride is the distance of rows in elements. y and dx are contiguous.
void bias_gelu(Dtype dtype, Activation gelu, int64_t rows, int64_t width, const void* x, int64_t x_stride,
               Parameter bias, void* y, int threads);
void bias_gelu_backward(Dtype dtype, Activation gelu, int64_t rows, int64_t width, const void* grad_y,
                        int64_t grad_y_stride, const void* x, int64_t x_stride, Parameter bias, void* dx, float* dbias,
                        int threads);
#endif

}  // namespace fastbert

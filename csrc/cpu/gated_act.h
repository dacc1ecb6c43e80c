// value * act(gate): arguments and kernels. No standard library header here: the kernel files are compiled once for
// each instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

constexpr int kGates = 6;  // the first ones of the activations

// Rows of `width` elements; a stride is the distance of rows in elements.
struct GatedAct {
    int64_t rows, width;
    const void* value;
    int64_t value_stride;
    const void* gate;
    int64_t gate_stride;
    const void* grad_y;  // backward only, and what follows
    int64_t grad_y_stride;
    void* dvalue;  // or null
    void* dgate;   // or null
    int64_t gradient_stride;
    void* y;  // forward only, contiguous
};

// Kernels run on rows [begin, end) and on one thread.
struct GatedActKernels {
    void (*forward[kDtypes][kGates])(const GatedAct&, int64_t begin, int64_t end);
    void (*backward[kDtypes][kGates])(const GatedAct&, int64_t begin, int64_t end);
};

#ifndef FASTBERT_ISA
void gated_act(Dtype dtype, Activation activation, const GatedAct& a, int threads);
void gated_act_backward(Dtype dtype, Activation activation, const GatedAct& a, int threads);
#endif

}  // namespace fastbert

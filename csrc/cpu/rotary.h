// Rotary position embedding: arguments and kernels. No standard library header here: the kernel files are compiled once
// for each instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

// Strides count elements; the features of a head lie one after another, as does a row of a table.
struct Rotary {
    int64_t batch, seq, heads, head_dim;
    const void* x;
    int64_t batch_stride, seq_stride, head_stride;
    int64_t pairs;  // of features that are turned; the ones behind are copied
    const void* cos;
    const void* sin;
    Dtype table_dtype;
    int64_t cos_stride, sin_stride;  // of positions
    const int64_t* positions;        // [batch, seq]; null: the index along seq
    bool interleaved, inverse;
    void* y;  // contiguous
};

// Kernels run on tokens [begin, end) of batch * seq, and on one thread.
struct RotaryKernels {
    void (*forward[kDtypes])(const Rotary&, int64_t begin, int64_t end, float* scratch);  // 4 * padded_width(2 * pairs)
};

#ifndef FASTBERT_ISA
void rotary(Dtype dtype, const Rotary& a, int threads);
#endif

}  // namespace fastbert

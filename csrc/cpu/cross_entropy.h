// Cross-entropy over logits: arguments and kernels. No standard library header here: the kernel files are compiled once
// for each instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

// `logits_stride` is the distance of rows in elements.
struct CrossEntropy {
    int64_t rows, classes;
    const void* logits;
    int64_t logits_stride;
    const int64_t* target;  // 0 … classes - 1, or ignore_index
    int64_t ignore_index;
    float label_smoothing;
    float* losses;
    float* lse;
};

struct CrossEntropyBackward {
    int64_t rows, classes;
    const float* grad_losses;
    int64_t grad_losses_stride;
    const void* logits;
    int64_t logits_stride;
    const int64_t* target;
    const float* lse;
    int64_t ignore_index;
    float label_smoothing;
    void* dlogits;  // contiguous; may be the logits where these are contiguous too
    bool stream;    // write it past the caches
};

// Kernels run on rows [begin, end) and on one thread.
struct CrossEntropyKernels {
    void (*forward[kDtypes])(const CrossEntropy&, int64_t begin, int64_t end);
    void (*backward[kDtypes])(const CrossEntropyBackward&, int64_t begin, int64_t end);
};

#ifndef FASTBERT_ISA
void cross_entropy(Dtype dtype, const CrossEntropy& a, int threads);
void cross_entropy_backward(Dtype dtype, CrossEntropyBackward a, int threads);
#endif

}  // namespace fastbert

// The sum of three embeddings, its layer norm and dropout: arguments and kernels. No standard library header here: the
// kernel files are compiled once for each instruction set (see simd.h).
#pragma once

#include "rows.h"

namespace fastbert {

// A table [entries, width] and the entry of each token. Of the three the later two may be absent.
struct Table {
    const void* data;
    int64_t stride;      // of entries, in elements
    const int64_t* ids;  // [tokens]; null: the table is absent
};

constexpr int kTables = 3;  // words, positions, token types

struct EmbeddingForward {
    int64_t tokens, width;
    Table tables[kTables];
    const float* weight;
    const float* bias;
    float eps;
    Dropout dropout;
    void* y;      // [tokens, width]
    float* mean;  // null: not wanted, and then neither is rstd
    float* rstd;
};

struct EmbeddingBackward {
    int64_t tokens, width;
    Table tables[kTables];
    const void* grad_y;
    int64_t grad_y_stride;
    const float* mean;
    const float* rstd;
    const float* weight;
    Dropout dropout;
    float* d_total;  // [tokens, padded_width(width)], of the sum of embeddings, in natural order; null: not wanted
    // Sums over the tokens [width], in block order; a kernel adds to what is there. Null: not wanted, both or neither.
    float* dweight;
    float* dbias;
};

// Kernels run on tokens [begin, end) and on one thread.
struct EmbeddingKernels {
    // scratch: 3 * padded_width(width)
    void (*forward[kDtypes])(const EmbeddingForward&, int64_t begin, int64_t end, float* scratch);
    void (*backward[kDtypes])(const EmbeddingBackward&, int64_t begin, int64_t end, float* scratch);
    // The sum of `count` rows of a matrix, in their order, in columns [begin, end): 0 where there is none.
    void (*sum_selected)(const float* matrix, int64_t stride, const int64_t* rows, int64_t count, int64_t begin,
                         int64_t end, float* sum);
};

// Gradient of a table: of every entry the sum over its tokens.
struct TableGradient {
    float* data;  // [entries, width]; null: not wanted
    int64_t entries;
    int64_t padding;  // this entry gets none; -1: every one does
};

#ifndef FASTBERT_ISA
void embedding_layer_norm(Dtype dtype, EmbeddingForward a, Parameter weight, Parameter bias, int threads);
void embedding_layer_norm_backward(Dtype dtype, EmbeddingBackward a, const TableGradient (&gradients)[kTables],
                                   Parameter weight, int threads);
#endif

}  // namespace fastbert

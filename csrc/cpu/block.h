// A transformer block on packed sequences, for inference: the operations of one layer in one call, on prepacked
// weights.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "attention.h"
#include "layer_norm.h"
#include "linear.h"

namespace fastbert {

// Memory that a packed weight was made from, and what it held then.
struct Original {
    const void* data;
    int64_t bytes;
    uint64_t fingerprint;
};

// A linear layer's weight, packed for `Block::precision`, and where it came from.
struct BlockLinear {
    int64_t out, in;
    const void* packed;
    std::vector<Parameter> biases;  // one, or as many as `out` is cut into, in equal parts of one dtype
    std::vector<Original> originals;
};

struct Block {
    Precision precision;
    Dtype stream;  // of x, y and what the residuals carry
    int64_t heads;
    Activation activation;
    float eps;
    bool norm_first, causal;
    BlockLinear qkv, out, up, down;
    Parameter attention_norm_weight, attention_norm_bias, feed_forward_norm_weight, feed_forward_norm_bias;
    std::string isa;  // that the weights are packed for
};

struct BlockCall {
    int64_t rows;
    const void* x;              // [rows, hidden], contiguous
    const int32_t* cu_seqlens;  // [batch + 1]
    int64_t batch, max_seqlen;
    void* y;  // [rows, hidden], contiguous; it may be x
};

// Of these only kDone leaves a result.
enum class BlockOutcome : int {
    kDone = 0,
    kStale = 1,   // an original has changed behind its version, or the instruction set is another: pack again
    kRefused = 2  // cu_seqlens does not cut the rows into sequences of at most max_seqlen
};
// `count` blocks of one width and stream, one after another; no blocks leave y as it is.
BlockOutcome run_blocks(const Block* const* blocks, int64_t count, BlockCall call, int threads);

// Of a few samples of the data: other numbers all over it change it; one other number may not.
uint64_t fingerprint(const void* data, int64_t bytes);

}  // namespace fastbert

// Gradients of attention: arguments and kernels. No standard library header here, as in attention.h.
#pragma once

#include "attention.h"

namespace fastbert {

// As AttentionOperand, to write; its element stride is 1.
struct AttentionGradient {
    void* data;
    int64_t batch, head, token;
};

struct AttentionBackward {
    Attention forward;  // its out and lse are read
    AttentionOperand grad_out;
    AttentionGradient dq, dk, dv;
    float* dmask;                                       // of an additive mask, zeros before; or null
    int64_t dmask_batch, dmask_head, dmask_q, dmask_k;  // 0: summed over
};

struct AttentionBackwardKernels {
    int64_t tile_queries;
    // Bytes of one thread's workspace.
    int64_t (*workspace[kDtypes])(const Attention&);
    // One head of keys of one sequence, with all heads of queries that read it.
    void (*backward[kDtypes])(const AttentionBackward&, const Sequence&, int64_t kv_head, char* workspace);
};

#ifndef FASTBERT_ISA
void attention_backward(Dtype dtype, AttentionBackward b, int threads);
#endif

}  // namespace fastbert

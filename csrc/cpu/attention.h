// Scaled dot-product attention: arguments and kernels. No standard library header here: the kernel files are compiled
// once for each instruction set (see simd.h).
#pragma once

#include <stdint.h>

#include "types.h"

namespace fastbert {

// Strides count elements. Of packed sequences a token's row is that of all tokens, and there is no batch stride.
struct AttentionOperand {
    const void* data;
    int64_t batch, head, token, element;
};

enum MaskKind : int { kNoMask = 0, kBooleanMask = 1, kAdditiveMask = 2 };

// seq_q and seq_k are the lengths of dense sequences; of packed ones, whose boundaries are cu_seqlens, the longest.
struct Attention {
    int64_t batch, heads, kv_heads, head_dim, value_dim, seq_q, seq_k;
    int64_t longest_k;            // of all sequences; attention() finds it
    const int32_t* cu_seqlens_q;  // [batch + 1]; null: dense
    const int32_t* cu_seqlens_k;
    const int32_t* lengths_k;  // [batch]: keys of each dense sequence, at most seq_k; null: seq_k of all
    AttentionOperand q, k, v;
    void* out;  // its element stride is 1
    int64_t out_batch, out_head, out_token;
    float* lse;  // null: not wanted; its token stride is 1
    int64_t lse_batch, lse_head;
    MaskKind mask_kind;
    const void* mask;  // uint8_t, 1 = attend, or float added to the logits
    int64_t mask_batch, mask_head, mask_q, mask_k;
    const uint8_t* padding;  // [batch, seq_k], 1 = attend; or null
    int64_t padding_batch, padding_key;
    const float* slopes;  // of ALiBi: minus slope times the distance from the diagonal is added; or null
    int64_t slopes_batch, slopes_head;
    float scale;
    // Query i sees the keys from i + shift - left to i + shift + right, where shift = seq_k - seq_q of its sequence if
    // bottom_right, else 0. Negative: no limit.
    int64_t left, right;
    bool bottom_right;
    // Rows of the random stream are those of [batch, heads, seq_q, seq_k].
    Dropout dropout;
};

// Lengths of sequence b and where its rows begin.
struct Sequence {
    int64_t index, first_q, first_k, seq_q, seq_k;
};

static inline Sequence sequence_of(const Attention& a, int64_t b) {
    if (!a.cu_seqlens_q) return {b, 0, 0, a.seq_q, a.lengths_k ? a.lengths_k[b] : a.seq_k};
    return {b, a.cu_seqlens_q[b], a.cu_seqlens_k[b], a.cu_seqlens_q[b + 1] - a.cu_seqlens_q[b],
            a.cu_seqlens_k[b + 1] - a.cu_seqlens_k[b]};
}

struct KeyRange {
    int64_t begin, end;
};

// Keys that some query of [begin, end) sees, as far as the window tells.
static inline KeyRange visible_keys(const Attention& a, const Sequence& s, int64_t begin, int64_t end) {
    const int64_t shift = a.bottom_right ? s.seq_k - s.seq_q : 0;
    KeyRange range = {0, s.seq_k};
    if (a.left >= 0 && begin + shift - a.left > 0) range.begin = begin + shift - a.left;
    if (a.right >= 0 && end + shift + a.right < s.seq_k) range.end = end + shift + a.right;
    if (range.begin > range.end) range.begin = range.end = 0;
    return range;
}

// Work is counted in pairs of a query and a key, times head_dim + value_dim.
constexpr int64_t kLeastAttentionChunk = 1 << 17;  // below, another thread costs more than it saves
constexpr int64_t kTileKeys = 24;                  // a tile's own work, as keys

static inline int64_t tile_cost(const Attention& a, const Sequence& s, int64_t begin, int64_t tile) {
    const KeyRange keys = visible_keys(a, s, begin, begin + tile < s.seq_q ? begin + tile : s.seq_q);
    return tile * (keys.end - keys.begin + kTileKeys) * (a.head_dim + a.value_dim);
}

// Which keys and values lie packed in a thread's workspace.
struct Panels {
    int64_t sequence, head;  // of keys; -1: none yet
};

struct AttentionKernels {
    // Queries that are worked on together.
    int64_t tile_queries;
    // Bytes of one thread's workspace.
    int64_t (*workspace[kDtypes])(const Attention&);
    // Queries [begin, end) of one head of one sequence, begin being a multiple of tile_queries. `panels` belongs to the
    // workspace.
    void (*forward[kDtypes])(const Attention&, const Sequence&, int64_t head, int64_t begin, int64_t end,
                             char* workspace, Panels& panels);
};

#ifndef FASTBERT_ISA
void attention(Dtype dtype, Attention a, int threads);
#endif

}  // namespace fastbert

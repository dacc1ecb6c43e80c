// A tile of queries against a block of keys: which of them see each other, biases, and dropout. For files that are
// compiled once for each instruction set, like simd.h.
#pragma once

#include "attention.h"
#include "attention_products.h"
#include "philox.h"
#include "simd.h"

namespace fastbert {
namespace {

constexpr int kKeyBlock = 64;  // a multiple of 4: a block draws whole groups of the dropout stream
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kInfinity = __builtin_inff();

FASTBERT_INLINE int64_t aligned_bytes(int64_t floats) {
    return (floats * 4 + 63) / 64 * 64;
}

// Keys that a byte per key hides.
struct KeyMask {
    const uint8_t* at;  // null: hides nothing
    int64_t stride;
    FASTBERT_INLINE_MEMBER bool visible(int64_t key) const { return !at || at[key * stride] != 0; }
};

// What a tile needs to know of its call, in the units that it computes in: a logit is `unit` times a score.
struct Tile {
    int64_t first, shift;  // first query; its diagonal
    int count;
    int64_t left, right;  // int32 values, or INT32_MAX
    KeyMask key_masks[2];
    const char* mask;  // of the tile's first query, for a mask of queries and keys
    float slope;
    bool has_slope;
    bool natural;  // scores are scaled and biased logits, else plain products
    float scale;   // its sign is in the queries
    float unit;
    uint64_t dropout_row;  // index of the first query's row of the random stream, divided by 4
};

FASTBERT_INLINE vint lane_numbers() {
    vint lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane;
}

FASTBERT_INLINE vfloat select(vint mask, vfloat a, vfloat b) {
    return mask ? a : b;
}

FASTBERT_INLINE vfloat load_mask(const float* at, int64_t stride, int count) {
    if (stride == 1) return count == kLanes ? load(at) : load_part(at, count);
    vfloat v = {};
    for (int i = 0; i < count; ++i) v[i] = at[i * stride];
    return v;
}

// All ones where the byte is set.
FASTBERT_INLINE vfloat load_mask(const uint8_t* at, int64_t stride, int count) {
    vint v = {};
    for (int i = 0; i < count; ++i) v[i] = -(at[i * stride] != 0);
    return (vfloat)v;
}

// A mask [count, keys], transposed: [keys, V vectors]. Lanes behind `count` are 0.
template <int V, class M>
static __attribute__((noinline)) void transpose_mask(const M* mask, int64_t q_stride, int64_t k_stride, int count,
                                                     int keys, float* out) {
    for (int v = 0; v < V; ++v) {
        for (int key = 0; key < keys; key += kLanes) {
            const int wanted = lanes_of(keys - key);
            vfloat rows[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int query = v * kLanes + i;
                rows[i] =
                    query < count ? load_mask(mask + query * q_stride + key * k_stride, k_stride, wanted) : vfloat{};
            }
            transpose(rows);
            for (int i = 0; i < wanted; ++i) store(out + ((key + i) * V + v) * kLanes, rows[i]);
        }
    }
}

// Scores of the keys [begin, begin + count) with biases and masks; `top` becomes their maximum.
template <int V>
static __attribute__((noinline)) void mask_scores(const Attention& a, const Tile& t, int64_t begin, int count,
                                                  float* scores, float* extra, vfloat (&top)[V]) {
    if (t.mask && a.mask_kind == kAdditiveMask) {
        const float* mask = (const float*)t.mask + begin * a.mask_k;
        transpose_mask<V>(mask, a.mask_q, a.mask_k, t.count, count, extra);
    } else if (t.mask) {
        const uint8_t* mask = (const uint8_t*)t.mask + begin * a.mask_k;
        transpose_mask<V>(mask, a.mask_q, a.mask_k, t.count, count, extra);
    }
    const vint row = lane_numbers() + (int32_t)(t.first + t.shift);
    const vfloat hidden = splat(-kInfinity);
    vfloat most[V];
    for (int v = 0; v < V; ++v) most[v] = hidden;
    for (int i = 0; i < count; ++i) {
        const int64_t key = begin + i;
        const bool visible = t.key_masks[0].visible(key) && t.key_masks[1].visible(key);
        for (int v = 0; v < V; ++v) {
            const int at = (i * V + v) * kLanes;
            const vint distance = (int32_t)key - (row + v * kLanes);
            vfloat s = load(scores + at);
            if (t.natural) s = s * t.scale;
            if (t.has_slope)
                s = s - splat(t.slope) * __builtin_convertvector(distance < 0 ? -distance : distance, vfloat);
            if (t.mask && a.mask_kind == kAdditiveMask) s = s + load(extra + at);
            if (t.mask && a.mask_kind == kBooleanMask) s = select((vint)load(extra + at), s, hidden);
            s = select((distance > (int32_t)t.right) | (distance < (int32_t)-t.left), hidden, s);
            if (!visible) s = hidden;
            store(scores + at, s);
            most[v] = maximum(s, most[v]);
        }
    }
    for (int v = 0; v < V; ++v) top[v] = most[v];
}

// Factors of dropout for the keys [begin, begin + count): [keys, V vectors].
template <int V>
static __attribute__((noinline)) void draw_dropout(const Dropout& dropout, uint64_t first_row, int64_t row_groups,
                                                   int64_t begin, int count, float* factors) {
    vlong even, odd;  // rows of the even lanes, and of the odd ones: so their words are joined without a shuffle
    for (int i = 0; i < kLanes / 2; ++i) {
        even[i] = (uint64_t)(2 * i) * (uint64_t)row_groups;
        odd[i] = (uint64_t)(2 * i + 1) * (uint64_t)row_groups;
    }
    const vuint threshold = splat(dropout.threshold);
    for (int key = 0; key < count; key += 4) {
        for (int v = 0; v < V; ++v) {
            const vlong first =
                splat_long(first_row + (uint64_t)(v * kLanes) * (uint64_t)row_groups + (uint64_t)(begin + key) / 4);
            const PhiloxWords x = philox_of(dropout.seed, even + first), y = philox_of(dropout.seed, odd + first);
            const vlong low[4] = {x.c0, x.c1, x.c2, x.c3}, high[4] = {y.c0, y.c1, y.c2, y.c3};
            for (int i = 0; i < 4 && key + i < count; ++i) {
                const vuint words = (vuint)((low[i] & 0xFFFFFFFFu) | (high[i] << 32));
                store(factors + ((key + i) * V + v) * kLanes, where(words >= threshold, splat(dropout.scale)));
            }
        }
    }
}

// What every tile of a head shares.
FASTBERT_INLINE Tile tile_of_head(const Attention& a, const Sequence& s, int64_t head) {
    Tile t = {};
    t.shift = a.bottom_right ? s.seq_k - s.seq_q : 0;
    t.left = a.left < 0 || a.left > INT32_MAX ? INT32_MAX : a.left;
    t.right = a.right < 0 || a.right > INT32_MAX ? INT32_MAX : a.right;
    if (a.padding) t.key_masks[0] = {a.padding + s.index * a.padding_batch, a.padding_key};
    if (a.mask_kind == kBooleanMask && a.mask_q == 0) {
        t.key_masks[1] = {(const uint8_t*)a.mask + s.index * a.mask_batch + head * a.mask_head, a.mask_k};
    }
    t.has_slope = a.slopes != nullptr;
    if (t.has_slope) t.slope = a.slopes[s.index * a.slopes_batch + head * a.slopes_head];
    t.scale = a.scale < 0 ? -a.scale : a.scale;
    // Plain products are the cheaper unit. Not with biases, which are no multiples of the scale, nor where a masked
    // product, minus infinity, times the scale is not minus infinity, or a log-sum-exp divided by it not finite.
    t.natural = t.has_slope || a.mask_kind == kAdditiveMask || !(t.scale > 1e-30f && t.scale < kInfinity);
    t.unit = t.natural ? kLog2e : t.scale * kLog2e;
    return t;
}

// The tile that begins at t.first; `end` is that of the queries.
FASTBERT_INLINE void place(const Attention& a, const Sequence& s, int64_t head, int64_t end, Tile& t) {
    t.count = (int)(end - t.first < kTile ? end - t.first : kTile);
    if (a.mask_kind != kNoMask && !t.key_masks[1].at) {
        const int64_t at = s.index * a.mask_batch + head * a.mask_head + t.first * a.mask_q;
        t.mask = (const char*)a.mask + at * (a.mask_kind == kAdditiveMask ? (int64_t)sizeof(float) : 1);
    }
    const uint64_t row = (uint64_t)((s.index * a.heads + head) * a.seq_q + t.first);
    t.dropout_row = a.dropout.offset / 4 + row * (uint64_t)((a.seq_k + 3) / 4);
}

struct Seen {
    bool some, all;
};

// Whether some query of the tile may see some of the keys [begin, begin + count), and whether all see all of them, as
// far as the window and the masks of keys tell.
FASTBERT_INLINE Seen seen_of(const Tile& t, int64_t begin, int count) {
    Seen seen = {true, true};
    if (t.key_masks[0].at || t.key_masks[1].at) {
        seen.some = false;
        for (int64_t key = begin; key < begin + count; ++key) {
            const bool visible = t.key_masks[0].visible(key) && t.key_masks[1].visible(key);
            seen.some |= visible;
            seen.all &= visible;
        }
    }
    const int64_t diagonal = t.first + t.shift;
    seen.all &= begin + count - 1 <= diagonal + t.right && begin >= diagonal + t.count - 1 - t.left;
    return seen;
}

}  // namespace
}  // namespace fastbert

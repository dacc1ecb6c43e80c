// Attention kernels of one instruction set. Compiled once for each, with FASTBERT_ISA naming it: see simd.h for what
// such a file may not do.
//
// Dao, Fu, Ermon, Rudra, Ré: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, and
// Milakov, Gimelshein: "Online normalizer calculation for softmax", 2018: a tile of queries goes over the keys block by
// block, with a running maximum and sum for each query.
#include "attention.h"
#include "attention_products.h"
#include "attention_tiles.h"
#include "exponential.h"
#include "simd.h"

namespace fastbert {
namespace {

FASTBERT_INLINE bool has_key_panel(Floats, Dtype dtype, const Attention& a) {
    return dtype != kFloat32 || a.k.element != 1;
}

FASTBERT_INLINE bool has_value_panel(Floats, Dtype dtype, const Attention& a) {
    return dtype != kFloat32 || a.v.element != 1;
}

#if defined(__AVX512BF16__)
FASTBERT_INLINE bool has_key_panel(Pairs, Dtype, const Attention& a) {
    return a.k.element != 1 || a.head_dim % 2;
}

FASTBERT_INLINE bool has_value_panel(Pairs, Dtype, const Attention&) {
    return true;
}
#endif

// One thread's memory.
struct Workspace {
    float* queries;  // [steps, tile]
    float* scores;   // [kKeyBlock, tile]: logits, then weights
    float* extra;    // [kKeyBlock, tile]: the mask, then dropout's factors
    float* out;      // [value_dim, tile]
    float* keys;     // panels of the head's keys and values
    float* values;
    int64_t bytes;
};

template <class Product, class T>
FASTBERT_INLINE Workspace divide(const Attention& a, char* memory) {
    constexpr Dtype dtype = sizeof(T) == 4 ? kFloat32 : kBfloat16;
    const int64_t steps = steps_of<Product>(a.head_dim);
    const bool has_extra = a.mask_kind != kNoMask || a.dropout.on;
    const int64_t sizes[6] = {
        aligned_bytes(steps * kTile),
        aligned_bytes((kKeyBlock + 1) * kTile),
        has_extra ? aligned_bytes(kKeyBlock * kTile) : 0,
        aligned_bytes(a.value_dim * kTile),
        has_key_panel(Product{}, dtype, a) ? aligned_bytes(a.longest_k * steps) : 0,
        has_value_panel(Product{}, dtype, a) ? aligned_bytes(steps_of<Product>(a.longest_k) * a.value_dim) : 0,
    };
    float* parts[6];
    int64_t offset = 0;
    for (int i = 0; i < 6; ++i) {
        parts[i] = (float*)((uintptr_t)memory + (uintptr_t)offset);
        offset += sizes[i];
    }
    return {parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], offset};
}

// Rows that are read soon, where they lie in the caller's tensors; or null.
struct Upcoming {
    const char* queries;  // of the next tile
    const char* keys;     // the key that will be scored with, or packed after, the one scored now
    int64_t key_bytes;
    const char* values;
    int64_t value_bytes;
};

template <int V>
FASTBERT_INLINE vfloat weight_of(const float* score, const vfloat& maximum, vfloat unit, const float* factor,
                                 vfloat& sum) {
    const vfloat p = exp2((load(score) - maximum) * unit);
    sum += p;
    return factor ? p * load(factor) : p;
}

// Scores become weights 2^((score - maximum) * unit), which `sum` takes; then dropout's factors, where there are.
template <int V>
static __attribute__((noinline)) void weigh(Floats, float* scores, int count, const vfloat (&maximum)[V], float unit,
                                            const float* factors, vfloat (&sum)[V]) {
    const vfloat u = splat(unit);
    vfloat total[V] = {};
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const int at = (i * V + v) * kLanes;
            store(scores + at, weight_of<V>(scores + at, maximum[v], u, factors ? factors + at : nullptr, total[v]));
        }
    }
    for (int v = 0; v < V; ++v) sum[v] = total[v];
}

#if defined(__AVX512BF16__)
// The weights of two keys become one row of pairs.
template <int V>
static __attribute__((noinline)) void weigh(Pairs, float* scores, int count, const vfloat (&maximum)[V], float unit,
                                            const float* factors, vfloat (&sum)[V]) {
    const vfloat u = splat(unit);
    vfloat total[V] = {};
    int i = 0;
    for (; i + 1 < count; i += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const int even = (i * V + v) * kLanes, odd = even + V * kLanes;
            const vfloat p = weight_of<V>(scores + even, maximum[v], u, factors ? factors + even : nullptr, total[v]);
            const vfloat q = weight_of<V>(scores + odd, maximum[v], u, factors ? factors + odd : nullptr, total[v]);
            store(scores + (i / 2 * V + v) * kLanes, pairs_of(p, q));
        }
    }
    for (int v = 0; v < V && i < count; ++v) {
        const int even = (i * V + v) * kLanes;
        const vfloat p = weight_of<V>(scores + even, maximum[v], u, factors ? factors + even : nullptr, total[v]);
        store(scores + (i / 2 * V + v) * kLanes, pairs_of(p, vfloat{}));
    }
    for (int v = 0; v < V; ++v) sum[v] = total[v];
}
#endif

// Where the products read the keys and the values of a head.
struct Rows {
    const char* keys;
    int64_t key_bytes;
    const char* values;
    int64_t value_bytes;
};

template <class Product, class T, int V>
static void forward_tile(const Attention& a, const Sequence& s, int64_t head, const Tile& t, const Upcoming& next,
                         const Rows& rows, const Workspace& w) {
    const int64_t steps = steps_of<Product>(a.head_dim);
    const T* q = (const T*)a.q.data + s.index * a.q.batch + head * a.q.head + (s.first_q + t.first) * a.q.token;
    transpose_queries<Product, V>(q, a.q.token, a.q.element, t.count, a.head_dim, a.scale < 0 ? Product::kSign : 0u,
                                  w.queries);

    T* const out = (T*)a.out + s.index * a.out_batch + head * a.out_head + (s.first_q + t.first) * a.out_token;
    vfloat maxima[V], sums[V] = {}, decay[V];
    for (int v = 0; v < V; ++v) maxima[v] = splat(-kInfinity);
    vint is_nan[V] = {};
    bool first = true;
    const KeyRange range = visible_keys(a, s, t.first, t.first + t.count);
    for (int64_t begin = range.begin / 4 * 4; begin < range.end; begin += kKeyBlock) {
        const int count = (int)(range.end - begin < kKeyBlock ? range.end - begin : kKeyBlock);
        const Seen seen = seen_of(t, begin, count);
        if (!seen.some) continue;

        vfloat top[V];
        const char* const values = rows.values + begin / Product::kElements * rows.value_bytes;
        const char* const keys = rows.keys + begin * rows.key_bytes;
        const bool last = begin + count == range.end;
        Ahead ahead[4] = {
            {next.keys ? next.keys + begin * next.key_bytes : nullptr, next.key_bytes, a.head_dim * (int64_t)sizeof(T),
             kKeysAtOnce, next.keys ? kKeyBlock : 0, false},
            {next.values ? next.values + begin * next.value_bytes : nullptr, next.value_bytes,
             a.value_dim * (int64_t)sizeof(T), kKeysAtOnce, next.values ? kKeyBlock : 0, false},
            {next.queries, a.q.token * (int64_t)sizeof(T), a.head_dim * (int64_t)sizeof(T), kKeysAtOnce,
             last ? kTile : 0, false},
            {(const char*)out, a.out_token * (int64_t)sizeof(T), a.value_dim * (int64_t)sizeof(T), kKeysAtOnce,
             last ? t.count : 0, true},
        };
        score_block<Product, V>(w.queries, keys, rows.key_bytes, steps, count, ahead, w.scores, top);
        if (!seen.all || t.natural || t.mask) mask_scores<V>(a, t, begin, count, w.scores, w.extra, top);

        vfloat finite[V];  // where nothing is seen yet the maximum counts as 0: minus infinity from it is no number
        for (int v = 0; v < V; ++v) {
            const vfloat before = maxima[v];
            maxima[v] = maximum(top[v], before);
            finite[v] = select(maxima[v] == splat(-kInfinity), vfloat{}, maxima[v]);
            decay[v] = exp2((before - finite[v]) * splat(t.unit));
            if (any(maxima[v] == splat(kInfinity))) {
                is_nan[v] |= (before < splat(kInfinity)) & (sums[v] != sums[v]);
                for (int i = 0; i < count; ++i) {
                    const vfloat score = load(w.scores + (i * V + v) * kLanes);
                    is_nan[v] |= score != score;
                }
            }
            sums[v] = sums[v] * decay[v];
        }
        const float* factors = nullptr;
        if (a.dropout.on) {
            draw_dropout<V>(a.dropout, t.dropout_row, (a.seq_k + 3) / 4, begin, count, w.extra);
            factors = w.extra;
        }
        vfloat sum[V];
        weigh<V>(Product{}, w.scores, count, finite, t.unit, factors, sum);
        for (int v = 0; v < V; ++v) sums[v] += sum[v];
        add_value_block<Product, V>(w.scores, values, rows.value_bytes, steps_of<Product>(count), a.value_dim, first,
                                    decay, w.out);
        first = false;
    }

    vfloat factor[V];
    for (int v = 0; v < V; ++v) factor[v] = where(sums[v] != splat(0.0f), 1.0f / sums[v]);
    if (first) {
        for (int64_t i = 0; i < a.value_dim * V; ++i) store(w.out + i * kLanes, vfloat{});
    }
    transpose_out<V>(w.out, factor, t.count, a.value_dim, out, a.out_token);
    if (!a.lse) return;
    float* lse = a.lse + s.index * a.lse_batch + head * a.lse_head + s.first_q + t.first;
    for (int i = 0; i < t.count; ++i) {
        const float most = maxima[i / kLanes][i % kLanes], sum = sums[i / kLanes][i % kLanes];
        if (most == kInfinity) {
            lse[i] = is_nan[i / kLanes][i % kLanes] ? __builtin_nanf("") : kInfinity;
        } else {
            lse[i] = sum == 0.0f ? -kInfinity
                                 : (t.natural || most == -kInfinity ? most : most * t.scale) + __builtin_logf(sum);
        }
    }
}

template <class Product, class T>
static void pack(const Attention& a, const Sequence& s, int64_t head, const Workspace& w, Panels& panels, Rows& rows) {
    constexpr Dtype dtype = sizeof(T) == 4 ? kFloat32 : kBfloat16;
    const T* k = (const T*)a.k.data + s.index * a.k.batch + head * a.k.head + s.first_k * a.k.token;
    const T* v = (const T*)a.v.data + s.index * a.v.batch + head * a.v.head + s.first_k * a.v.token;
    rows = {(const char*)k, a.k.token * (int64_t)sizeof(T), (const char*)v, a.v.token * (int64_t)sizeof(T)};
    const bool stale = panels.sequence != s.index || panels.head != head;
    panels = {s.index, head};
    if (has_key_panel(Product{}, dtype, a)) {
        if (stale) pack_keys<Product>(k, a.k.token, a.k.element, s.seq_k, a.head_dim, w.keys);
        rows.keys = (const char*)w.keys;
        rows.key_bytes = steps_of<Product>(a.head_dim) * 4;
    }
    if (has_value_panel(Product{}, dtype, a)) {
        if (stale) pack_values(Product{}, v, a.v.token, a.v.element, s.seq_k, a.value_dim, w.values);
        rows.values = (const char*)w.values;
        rows.value_bytes = a.value_dim * 4;
    }
}

// What a product reads from the caller's tensor comes as it is scored, what is packed before: with the last tile of the
// head before.
template <class Product, class T>
static Upcoming upcoming(const Attention& a, const Sequence& s, int64_t head, int64_t first, bool last) {
    constexpr Dtype dtype = sizeof(T) == 4 ? kFloat32 : kBfloat16;
    const T* q = (const T*)a.q.data + s.index * a.q.batch + head * a.q.head + (s.first_q + first) * a.q.token;
    const int64_t group = a.heads / a.kv_heads, kv_head = head / group;
    const T* k = (const T*)a.k.data + s.index * a.k.batch + kv_head * a.k.head + s.first_k * a.k.token;
    const T* v = (const T*)a.v.data + s.index * a.v.batch + kv_head * a.v.head + s.first_k * a.v.token;
    const bool next_head = last && head + 1 < a.heads;
    const bool next_panel = next_head && (head + 1) % group == 0;
    Upcoming u = {nullptr, nullptr, a.k.token * (int64_t)sizeof(T), nullptr, a.v.token * (int64_t)sizeof(T)};
    u.queries = (const char*)(last ? q - first * a.q.token + (next_head ? a.q.head : 0) : q + kTile * a.q.token);
    if (!has_key_panel(Product{}, dtype, a)) {
        u.keys = (const char*)(k + kKeysAtOnce * a.k.token);
    } else if (next_panel) {
        u.keys = (const char*)(k + a.k.head);
    }
    if (!has_value_panel(Product{}, dtype, a)) {
        u.values = (const char*)v;
    } else if (next_panel) {
        u.values = (const char*)(v + a.v.head);
    }
    return u;
}

template <class Product, class T>
static void forward(const Attention& a, const Sequence& s, int64_t head, int64_t begin, int64_t end, char* memory,
                    Panels& panels) {
    const Workspace w = divide<Product, T>(a, memory);
    Rows rows;
    pack<Product, T>(a, s, head / (a.heads / a.kv_heads), w, panels, rows);

    Tile t = tile_of_head(a, s, head);
    for (t.first = begin; t.first < end; t.first += kTile) {
        place(a, s, head, end, t);
        const bool last = t.first + kTile >= end;
        const Upcoming next = upcoming<Product, T>(a, s, head, t.first, last);
        switch ((t.count + kLanes - 1) / kLanes) {
            case 1:
                forward_tile<Product, T, 1>(a, s, head, t, next, rows, w);
                break;
            case 2:
                forward_tile<Product, T, 2>(a, s, head, t, next, rows, w);
                break;
#if defined(__AVX512F__)
            case 3:
                forward_tile<Product, T, 3>(a, s, head, t, next, rows, w);
                break;
            default:
                forward_tile<Product, T, 4>(a, s, head, t, next, rows, w);
#endif
        }
    }
}

template <class Product, class T>
static int64_t workspace(const Attention& a) {
    return divide<Product, T>(a, nullptr).bytes;
}

}  // namespace

namespace FASTBERT_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    kTile,
    {workspace<Floats, float>, workspace<Bfloat16Product, bfloat16>},
    {forward<Floats, float>, forward<Bfloat16Product, bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

// Kernels of attention's gradients, of one instruction set. Compiled once for each, with FASTBERT_ISA naming it: see
// simd.h for what such a file may not do.
//
// Dao, Fu, Ermon, Rudra, Ré: "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022,
// section B.2: five products for each tile of queries and block of keys, and no more memory than the operands take.
// P = exp(S - lse), dP = dO Vᵀ, dS = P (dP - D) with D = Σ dO O in each row; dQ = scale dS K, dK = scale dSᵀ Q,
// dV = Pᵀ dO. In the first three lanes are queries, as in the forward pass; in the last two they are columns.
#include "attention_backward.h"
#include "attention_products.h"
#include "attention_tiles.h"
#include "exponential.h"
#include "simd.h"

namespace fastbert {
namespace {

// exp(S - lse) multiplies the rounding error of a log-sum-exp by its size. Where it is larger than this, the rows'
// maxima and sums are found again: among masks of a dtype's least number nothing of a sum is left in it.
constexpr float kLargestLogSumExp = 64.0f;

FASTBERT_INLINE int64_t whole_vectors(int64_t width) {
    return (width + kLanes - 1) / kLanes * kLanes;
}

// One thread's memory. Steps are elements, or pairs of them: see the products.
struct Workspace {
    float* keys;        // [seq_k, steps of head_dim]
    float* values;      // [seq_k, steps of value_dim]
    float* key_steps;   // [steps of seq_k, head_dim]
    float* dk;          // [seq_k, whole vectors of head_dim]
    float* dv;          // [seq_k, whole vectors of value_dim]
    float* q_rows;      // panels of steps of queries
    float* grad_rows;   // and of the result's gradient
    float* q_lanes;     // [steps of head_dim, tile]
    float* grad_lanes;  // [steps of value_dim, tile]
    float* dq;          // [head_dim, tile]; before, out: [steps of value_dim, tile]
    float* weights;     // [kKeyBlock, tile]: logits, then weights
    float* dlogits;     // [kKeyBlock, tile]: the weights' gradients, then the logits'
    float* steps;       // [steps of kKeyBlock, tile]: the logits' gradients once more
    float* extra;       // [kKeyBlock, tile]: the mask, then dropout's factors
    int64_t bytes;
};

template <class Product>
FASTBERT_INLINE Workspace divide(const Attention& a, char* memory) {
    constexpr bool pairs = Product::kElements > 1;
    const int64_t key_columns = whole_vectors(a.head_dim), value_columns = whole_vectors(a.value_dim);
    const int64_t key_steps = steps_of<Product>(a.head_dim), value_steps = steps_of<Product>(a.value_dim);
    const bool has_extra = a.mask_kind != kNoMask || a.dropout.on;
    const int64_t sizes[14] = {
        a.longest_k * key_steps,
        a.longest_k * value_steps,
        pairs ? steps_of<Product>(a.longest_k) * a.head_dim : 0,
        a.longest_k * key_columns,
        a.longest_k * value_columns,
        steps_of<Product>(kTile) * key_columns,
        steps_of<Product>(kTile) * value_columns,
        key_steps * kTile,
        value_steps * kTile,
        (a.head_dim > value_steps ? a.head_dim : value_steps) * kTile,
        kKeyBlock * kTile,
        kKeyBlock * kTile,
        pairs ? steps_of<Product>(kKeyBlock) * kTile : 0,
        has_extra ? kKeyBlock * kTile : 0,
    };
    float* parts[14];
    int64_t offset = 0;
    for (int i = 0; i < 14; ++i) {
        parts[i] = (float*)((uintptr_t)memory + (uintptr_t)offset);
        offset += aligned_bytes(sizes[i]);
    }
    if (!pairs) {
        parts[2] = parts[0];
        parts[12] = parts[11];
    }
    return {parts[0], parts[1], parts[2],  parts[3],  parts[4],  parts[5],  parts[6], parts[7],
            parts[8], parts[9], parts[10], parts[11], parts[12], parts[13], offset};
}

// Step `step` of rows [count, width], at `column`.
template <class T>
FASTBERT_INLINE vfloat load_row(Floats, const T* rows, int64_t token, int64_t element, int step, int, int64_t column,
                                int64_t width) {
    return load_steps(Floats{}, rows + step * token, element, column, width, lanes_of(width - column));
}

#if defined(__AVX512BF16__)
FASTBERT_INLINE vfloat load_row(Pairs, const bfloat16* rows, int64_t token, int64_t element, int step, int count,
                                int64_t column, int64_t width) {
    const vuint even = (vuint)load_row(Floats{}, rows, token, element, 2 * step, count, column, width) >> 16;
    vuint odd = {};
    if (2 * step + 1 < count) odd = (vuint)load_row(Floats{}, rows, token, element, 2 * step + 1, count, column, width);
    return (vfloat)(even | odd);
}
#endif

// Rows [count, width] in panels of up to kTileVectors vectors of columns, each [steps, vectors]. Behind the width are
// zeros.
template <class Product, class T>
static __attribute__((noinline)) void pack_rows(const T* rows, int64_t token, int64_t element, int count, int64_t width,
                                                float* out) {
    const int steps = (int)steps_of<Product>(count);
    for (int64_t panel = 0; panel < width; panel += kTile) {
        for (int i = 0; i < steps; ++i) {
            for (int64_t column = panel; column < width && column < panel + kTile; column += kLanes) {
                store(out, load_row(Product{}, rows, token, element, i, count, column, width));
                out += kLanes;
            }
        }
    }
}

// N rows of sums += Σ_i weights[n, i] * rows[i] over the steps i, of one panel.
template <class Product, int V, int N>
FASTBERT_INLINE void add_rows(const float* rows, int64_t steps, const float* weights, int64_t weights_row, float* sums,
                              int64_t sums_row) {
    vfloat sum[N][V] = {};
    accumulate<Product, V, N>(rows, (const char*)weights, weights_row * 4, 4, steps, sum);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* const at = sums + n * sums_row + v * kLanes;
            store(at, load(at) + sum[n][v]);
        }
    }
}

template <class Product, int V, int N>
FASTBERT_INLINE void add_rows_rest(const float* rows, int64_t steps, const float* weights, int64_t weights_row,
                                   int keys, float* sums, int64_t sums_row) {
    if constexpr (N > 0) {
        if (keys == N) {
            add_rows<Product, V, N>(rows, steps, weights, weights_row, sums, sums_row);
        } else {
            add_rows_rest<Product, V, N - 1>(rows, steps, weights, weights_row, keys, sums, sums_row);
        }
    }
}

template <class Product, int V>
static __attribute__((noinline)) void add_panel(const float* rows, int64_t steps, const float* weights,
                                                int64_t weights_row, int keys, float* sums, int64_t sums_row) {
    for (; keys >= kKeysAtOnce; keys -= kKeysAtOnce) {
        add_rows<Product, V, kKeysAtOnce>(rows, steps, weights, weights_row, sums, sums_row);
        weights += kKeysAtOnce * weights_row;
        sums += kKeysAtOnce * sums_row;
    }
    add_rows_rest<Product, V, kKeysAtOnce - 1>(rows, steps, weights, weights_row, keys, sums, sums_row);
}

// sums [keys, whole vectors of width] += weights [keys, weights_row], of which `steps` count, * rows, in panels.
template <class Product>
FASTBERT_INLINE void add_row_block(const float* rows, int64_t steps, int64_t width, const float* weights,
                                   int64_t weights_row, int keys, float* sums) {
    const int64_t columns = whole_vectors(width);
    for (int64_t panel = 0; panel < columns; panel += kTile) {
        switch ((columns - panel) / kLanes) {
            case 1:
                add_panel<Product, 1>(rows, steps, weights, weights_row, keys, sums + panel, columns);
                break;
#if defined(__AVX512F__)
            case 2:
                add_panel<Product, 2>(rows, steps, weights, weights_row, keys, sums + panel, columns);
                break;
            case 3:
                add_panel<Product, 3>(rows, steps, weights, weights_row, keys, sums + panel, columns);
                break;
#endif
            default:
                add_panel<Product, kTileVectors>(rows, steps, weights, weights_row, keys, sums + panel, columns);
        }
        rows += steps * kTile;
    }
}

// What a row's weights and their gradients need: weight = 2^((score - top) * unit) * factor.
template <int V>
struct RowValues {
    vfloat top[V], factor[V];
    vfloat delta[V];  // Σ dO O = Σ_j P_ij dP_ij
};

// D of each row, from [steps, V vectors] of grad and out, rounded as the weights' gradients are: where one key has all
// the weight, nothing is left of their difference.
template <class Product, int V>
static __attribute__((noinline)) void find_delta(const float* grad, const float* out, int64_t steps,
                                                 vfloat (&delta)[V]) {
    for (int v = 0; v < V; ++v) {
        vfloat total = {};
        for (int64_t chain = 0; chain < steps; chain += kChainSteps) {
            vfloat sum = {};
            for (int64_t i = chain; i < steps && i < chain + kChainSteps; ++i) {
                const int64_t at = (i * V + v) * kLanes;
                sum = Product::step(load(grad + at), load(out + at), sum);
            }
            total = chain ? sum + total : sum;
        }
        delta[v] = total;
    }
}

template <class Product, int V>
FASTBERT_INLINE void score_keys(const Attention& a, const Tile& t, const Workspace& w, int64_t begin, int count,
                                bool all_seen, vfloat (&top)[V]) {
    Ahead ahead[4] = {};
    const int64_t steps = steps_of<Product>(a.head_dim);
    score_block<Product, V>(w.q_lanes, (const char*)(w.keys + begin * steps), steps * 4, steps, count, ahead, w.weights,
                            top);
    if (!all_seen || t.natural || t.mask) mask_scores<V>(a, t, begin, count, w.weights, w.extra, top);
}

// The rows' maxima and sums, as the forward pass finds them.
template <class Product, int V>
static __attribute__((noinline)) void find_statistics(const Attention& a, const Sequence& s, const Tile& t,
                                                      const Workspace& w, vfloat (&maxima)[V], vfloat (&sums)[V]) {
    vfloat most[V], total[V] = {};
    for (int v = 0; v < V; ++v) most[v] = splat(-kInfinity);
    const KeyRange range = visible_keys(a, s, t.first, t.first + t.count);
    for (int64_t begin = range.begin / 4 * 4; begin < range.end; begin += kKeyBlock) {
        const int count = (int)(range.end - begin < kKeyBlock ? range.end - begin : kKeyBlock);
        const Seen seen = seen_of(t, begin, count);
        if (!seen.some) continue;
        vfloat top[V];
        score_keys<Product, V>(a, t, w, begin, count, seen.all, top);
        for (int v = 0; v < V; ++v) {
            const vfloat before = most[v];
            most[v] = maximum(top[v], before);
            const vfloat finite = select(most[v] == splat(-kInfinity), vfloat{}, most[v]);
            total[v] = total[v] * exp2((before - finite) * splat(t.unit));
            for (int i = 0; i < count; ++i) {
                total[v] += exp2((load(w.weights + (i * V + v) * kLanes) - finite) * splat(t.unit));
            }
        }
    }
    for (int v = 0; v < V; ++v) {
        maxima[v] = most[v];
        sums[v] = total[v];
    }
}

template <class Product, int V>
FASTBERT_INLINE void find_weights(const Attention& a, const Sequence& s, int64_t head, const Tile& t,
                                  const Workspace& w, RowValues<V>& row) {
    const float* const lse = a.lse + s.index * a.lse_batch + head * a.lse_head + s.first_q + t.first;
    vfloat found[V];
    vint large = {};
    for (int v = 0; v < V; ++v) {
        const int count = lanes_of(t.count - v * kLanes);
        found[v] = load_part(lse + v * kLanes, count);
        found[v] = select(lanes_below(count), found[v], splat(-kInfinity));
        const vfloat size = maximum(found[v], -found[v]);
        large |= (size > splat(kLargestLogSumExp)) & (size < splat(kInfinity));
        row.top[v] = t.natural ? found[v] : found[v] / t.scale;
        row.factor[v] = splat(1.0f);
    }
    if (any(large)) {
        vfloat sums[V];
        find_statistics<Product, V>(a, s, t, w, row.top, sums);
        for (int v = 0; v < V; ++v) row.factor[v] = 1.0f / sums[v];
    }
    for (int v = 0; v < V; ++v) {
        // A row that sees nothing has weights of 0, and one with an infinite logit has none that are numbers.
        const vint sees_nothing = found[v] == splat(-kInfinity);
        row.top[v] = select(sees_nothing, splat(kInfinity), row.top[v]);
        row.factor[v] = select(sees_nothing, splat(1.0f), row.factor[v]);
        row.factor[v] = select(found[v] < splat(kInfinity), row.factor[v], splat(__builtin_nanf("")));
    }
}

// Scores become weights, with dropout's factors where there are, and the weights' gradients those of the logits.
template <int V>
static __attribute__((noinline)) void differentiate(float* scores, float* gradients, int count, const RowValues<V>& row,
                                                    float unit, const float* dropout) {
    const vfloat u = splat(unit);
    const RowValues<V> r = row;
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            const int at = (i * V + v) * kLanes;
            const vfloat p = exp2((load(scores + at) - r.top[v]) * u) * r.factor[v];
            vfloat dp = load(gradients + at), kept = p;
            if (dropout) {
                const vfloat factor = load(dropout + at);
                kept = p * factor;
                dp = dp * factor;
            }
            store(scores + at, kept);
            store(gradients + at, p * (dp - r.delta[v]));
        }
    }
}

// Weights and logits' gradients [keys, V vectors] as elements of products: as they stand, and [steps of keys, V
// vectors].
template <int V>
FASTBERT_INLINE void make_steps(Floats, float*, float*, int, int, float*) {}

#if defined(__AVX512BF16__)
template <int V>
static __attribute__((noinline)) void make_steps(Pairs, float* weights, float* dlogits, int keys, int count,
                                                 float* steps) {
    const vfloat none = {};
    for (int key = 0; key < keys; key += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            // Lanes behind the count may be no numbers, and the last of an odd number counts in its pair.
            const vint valid = lanes_below(count - v * kLanes);
            const int even = key * V * kLanes, odd = even + V * kLanes;
            const vfloat ds = where(valid, load(dlogits + even + v * kLanes));
            const vfloat next = key + 1 < keys ? where(valid, load(dlogits + odd + v * kLanes)) : none;
            store(steps + (key / 2 * V + v) * kLanes, pairs_of(ds, next));
            store_lanes((bfloat16*)(dlogits + even) + v * kLanes, ds, kLanes);
            store_lanes((bfloat16*)(weights + even) + v * kLanes, where(valid, load(weights + even + v * kLanes)),
                        kLanes);
            if (key + 1 == keys) continue;
            store_lanes((bfloat16*)(dlogits + odd) + v * kLanes, next, kLanes);
            store_lanes((bfloat16*)(weights + odd) + v * kLanes, where(valid, load(weights + odd + v * kLanes)),
                        kLanes);
        }
    }
}
#endif

template <int V>
static __attribute__((noinline)) void add_mask_gradient(const AttentionBackward& b, const Sequence& s, int64_t head,
                                                        const Tile& t, int64_t begin, int count, const float* dlogits) {
    float* const first =
        b.dmask + s.index * b.dmask_batch + head * b.dmask_head + t.first * b.dmask_q + begin * b.dmask_k;
    if (b.dmask_q == 0) {
        for (int key = 0; key < count; ++key) {
            float sum = 0.0f;
            for (int i = 0; i < t.count; ++i) sum += dlogits[key * V * kLanes + i];
            first[key * b.dmask_k] += sum;
        }
        return;
    }
    for (int i = 0; i < t.count; ++i) {
        float* const row = first + i * b.dmask_q;
        if (b.dmask_k == 0) {
            float sum = 0.0f;
            for (int key = 0; key < count; ++key) sum += dlogits[key * V * kLanes + i];
            *row += sum;
        } else {
            for (int key = 0; key < count; ++key) row[key * b.dmask_k] += dlogits[key * V * kLanes + i];
        }
    }
}

template <class Product, class T, int V>
static void backward_tile(const AttentionBackward& b, const Sequence& s, int64_t head, const Tile& t,
                          const Workspace& w) {
    const Attention& a = b.forward;
    const int64_t token = s.first_q + t.first;
    const T* q = (const T*)a.q.data + s.index * a.q.batch + head * a.q.head + token * a.q.token;
    const T* grad =
        (const T*)b.grad_out.data + s.index * b.grad_out.batch + head * b.grad_out.head + token * b.grad_out.token;
    const T* out = (const T*)a.out + s.index * a.out_batch + head * a.out_head + token * a.out_token;
    pack_rows<Product>(q, a.q.token, a.q.element, t.count, a.head_dim, w.q_rows);
    pack_rows<Product>(grad, b.grad_out.token, b.grad_out.element, t.count, a.value_dim, w.grad_rows);
    transpose_queries<Product, V>(q, a.q.token, a.q.element, t.count, a.head_dim, a.scale < 0 ? Product::kSign : 0u,
                                  w.q_lanes);
    transpose_queries<Product, V>(grad, b.grad_out.token, b.grad_out.element, t.count, a.value_dim, 0u, w.grad_lanes);
    RowValues<V> row;
    const int64_t value_steps = steps_of<Product>(a.value_dim), query_steps = steps_of<Product>(t.count);
    transpose_queries<Product, V>(out, a.out_token, 1, t.count, a.value_dim, 0u, w.dq);
    find_delta<Product, V>(w.grad_lanes, w.dq, value_steps, row.delta);
    find_weights<Product, V>(a, s, head, t, w, row);

    bool first = true;
    vfloat one[V], top[V];
    for (int v = 0; v < V; ++v) one[v] = splat(1.0f);
    const KeyRange range = visible_keys(a, s, t.first, t.first + t.count);
    for (int64_t begin = range.begin / 4 * 4; begin < range.end; begin += kKeyBlock) {
        const int count = (int)(range.end - begin < kKeyBlock ? range.end - begin : kKeyBlock);
        const Seen seen = seen_of(t, begin, count);
        if (!seen.some) continue;
        score_keys<Product, V>(a, t, w, begin, count, seen.all, top);
        Ahead ahead[4] = {};
        score_block<Product, V>(w.grad_lanes, (const char*)(w.values + begin * value_steps), value_steps * 4,
                                value_steps, count, ahead, w.dlogits, top);
        const float* dropout = nullptr;
        if (a.dropout.on) {
            draw_dropout<V>(a.dropout, t.dropout_row, (a.seq_k + 3) / 4, begin, count, w.extra);
            dropout = w.extra;
        }
        differentiate<V>(w.weights, w.dlogits, count, row, t.unit, dropout);
        if (b.dmask) add_mask_gradient<V>(b, s, head, t, begin, count, w.dlogits);
        make_steps<V>(Product{}, w.weights, w.dlogits, count, t.count, w.steps);
        add_value_block<Product, V>(w.steps, (const char*)(w.key_steps + begin / Product::kElements * a.head_dim),
                                    a.head_dim * 4, steps_of<Product>(count), a.head_dim, first, one, w.dq);
        first = false;
        add_row_block<Product>(w.grad_rows, query_steps, a.value_dim, w.weights, V * kLanes, count,
                               w.dv + begin * whole_vectors(a.value_dim));
        add_row_block<Product>(w.q_rows, query_steps, a.head_dim, w.dlogits, V * kLanes, count,
                               w.dk + begin * whole_vectors(a.head_dim));
    }
    if (first) {
        for (int64_t i = 0; i < a.head_dim * V; ++i) store(w.dq + i * kLanes, vfloat{});
    }
    vfloat scale[V];
    for (int v = 0; v < V; ++v) scale[v] = splat(a.scale);
    T* const dq = (T*)b.dq.data + s.index * b.dq.batch + head * b.dq.head + token * b.dq.token;
    transpose_out<V>(w.dq, scale, t.count, a.head_dim, dq, b.dq.token);
}

// from [rows, whole vectors of width] * factor to out [rows, width].
template <class T>
static void store_gradient(const float* from, float factor, int64_t rows, int64_t width, T* out, int64_t token) {
    for (int64_t row = 0; row < rows; ++row, out += token) {
        for (int64_t column = 0; column < width; column += kLanes, from += kLanes) {
            store_lanes(out + column, load(from) * factor, lanes_of(width - column));
        }
    }
}

template <class Product, class T>
static void backward(const AttentionBackward& b, const Sequence& s, int64_t kv_head, char* memory) {
    const Attention& a = b.forward;
    const Workspace w = divide<Product>(a, memory);
    const T* k = (const T*)a.k.data + s.index * a.k.batch + kv_head * a.k.head + s.first_k * a.k.token;
    const T* v = (const T*)a.v.data + s.index * a.v.batch + kv_head * a.v.head + s.first_k * a.v.token;
    pack_keys<Product>(k, a.k.token, a.k.element, s.seq_k, a.head_dim, w.keys);
    pack_keys<Product>(v, a.v.token, a.v.element, s.seq_k, a.value_dim, w.values);
    if (w.key_steps != w.keys) pack_values(Product{}, k, a.k.token, a.k.element, s.seq_k, a.head_dim, w.key_steps);
    const int64_t key_columns = whole_vectors(a.head_dim), value_columns = whole_vectors(a.value_dim);
    for (int64_t i = 0; i < s.seq_k * key_columns; i += kLanes) store(w.dk + i, vfloat{});
    for (int64_t i = 0; i < s.seq_k * value_columns; i += kLanes) store(w.dv + i, vfloat{});

    const int64_t group = a.heads / a.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        Tile t = tile_of_head(a, s, head);
        for (t.first = 0; t.first < s.seq_q; t.first += kTile) {
            place(a, s, head, s.seq_q, t);
            switch ((t.count + kLanes - 1) / kLanes) {
                case 1:
                    backward_tile<Product, T, 1>(b, s, head, t, w);
                    break;
#if defined(__AVX512F__)
                case 2:
                    backward_tile<Product, T, 2>(b, s, head, t, w);
                    break;
                case 3:
                    backward_tile<Product, T, 3>(b, s, head, t, w);
                    break;
#endif
                default:
                    backward_tile<Product, T, kTileVectors>(b, s, head, t, w);
            }
        }
    }

    T* const dk = (T*)b.dk.data + s.index * b.dk.batch + kv_head * b.dk.head + s.first_k * b.dk.token;
    T* const dv = (T*)b.dv.data + s.index * b.dv.batch + kv_head * b.dv.head + s.first_k * b.dv.token;
    store_gradient(w.dk, a.scale, s.seq_k, a.head_dim, dk, b.dk.token);
    store_gradient(w.dv, 1.0f, s.seq_k, a.value_dim, dv, b.dv.token);
}

template <class Product>
static int64_t workspace(const Attention& a) {
    return divide<Product>(a, nullptr).bytes;
}

}  // namespace

namespace FASTBERT_ISA {

extern const AttentionBackwardKernels attention_backward_kernels;
const AttentionBackwardKernels attention_backward_kernels = {
    kTile,
    {workspace<Floats>, workspace<Bfloat16Product>},
    {backward<Floats, float>, backward<Bfloat16Product, bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

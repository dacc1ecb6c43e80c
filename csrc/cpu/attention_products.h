// The two products of attention, and how their operands lie in memory. For files that are compiled once for each
// instruction set, like simd.h.
//
// Lanes are queries. A tile of queries is transposed once, so that the logits of a key are vectors over queries, as are
// their maxima, sums and weights: nothing is ever reduced across lanes, and the weights are an operand of the second
// product as they stand. Keys and values are read one element at a time and spread over the lanes, from where they are:
// only other dtypes and strides than a product takes are packed into panels first.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__)
constexpr int kTileVectors = 4, kKeysAtOnce = 6, kValuesAtOnce = 6;  // of 32 registers 24 hold sums
#elif defined(__AVX2__)
constexpr int kTileVectors = 2, kKeysAtOnce = 6, kValuesAtOnce = 6;  // 12 of 16
#else
constexpr int kTileVectors = 2, kKeysAtOnce = 4, kValuesAtOnce = 4;  // 8 of 16: no fused multiply-add, no broadcast
#endif
constexpr int kTile = kTileVectors * kLanes;

typedef uint32_t word_at __attribute__((aligned(2), may_alias));

// Sums of products of float32.
struct Floats {
    static constexpr int kElements = 1;  // of the sum, in one step
    static constexpr uint32_t kSign = 0x80000000u;
    FASTBERT_INLINE_MEMBER static vfloat step(vfloat a, vfloat b, vfloat sum) { return fma(a, b, sum); }
    FASTBERT_INLINE_MEMBER static vfloat step(vfloat lanes, const char* at, vfloat sum) {
        return fma(lanes, splat(*(const float*)at), sum);
    }
};

#if defined(__AVX512BF16__)
// Sums of products of pairs of bfloat16.
struct Pairs {
    static constexpr int kElements = 2;
    static constexpr uint32_t kSign = 0x80008000u;
    FASTBERT_INLINE_MEMBER static vfloat step(vfloat a, vfloat b, vfloat sum) {
        return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    FASTBERT_INLINE_MEMBER static vfloat step(vfloat lanes, const char* at, vfloat sum) {
        const vuint pair = splat((uint32_t)*(const word_at*)at);
        return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)lanes, (__m512bh)pair);
    }
};

// Pairs (a, b) rounded to bfloat16, a in the lower half of each lane. Denormals become zero.
FASTBERT_INLINE vfloat pairs_of(vfloat a, vfloat b) {
    typedef uint16_t words __attribute__((vector_size(64)));
    words order;
    for (int i = 0; i < 32; ++i) order[i] = (uint16_t)(i / 2 + 16 * (i % 2));
    return (vfloat)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

typedef Pairs Bfloat16Product;
#else
typedef Floats Bfloat16Product;
#endif

// sum[n][v] += Σ_i lanes[i][v] * element(n, i) over `steps` steps.
template <class Product, int V, int N>
FASTBERT_INLINE void accumulate(const float* lanes, const char* elements, int64_t n_bytes, int64_t step_bytes,
                                int64_t steps, vfloat (&sum)[N][V]) {
    for (int64_t i = 0; i < steps; ++i) {
        vfloat x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) x[v] = load(lanes + v * kLanes);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[n][v] = Product::step(x[v], elements + n * n_bytes, sum[n][v]);
        }
        lanes += V * kLanes;
        elements += step_bytes;
    }
}

// Rows that will be needed soon, apart in memory, which no hardware foresees. Some are asked for with each group of
// keys, a cache line of each with each line of the keys: more at once would keep the loads waiting.
struct Ahead {
    const char* rows;
    int64_t row_bytes, bytes;
    int group;  // rows asked for with a group of keys
    int left;
    bool write;

    FASTBERT_INLINE_MEMBER void ask(int64_t at) const {
        if (at >= bytes) return;
        for (int i = 0; i < group && i < left; ++i) {
            if (write) {
                __builtin_prefetch(rows + i * row_bytes + at, 1);
            } else {
                __builtin_prefetch(rows + i * row_bytes + at, 0);
            }
        }
    }
    FASTBERT_INLINE_MEMBER void advance() {
        left -= group;
        rows += group * row_bytes;
    }
};

constexpr int64_t kLineSteps = 16;
constexpr int64_t kChainSteps = 64;  // longer sums are sums of sums: less is rounded away

// Logits of N keys: [N, V vectors]. `top` takes their maximum.
template <class Product, int V, int N>
FASTBERT_INLINE void score(const float* queries, const char* keys, int64_t row_bytes, int64_t steps,
                           const Ahead (&ahead)[4], float* scores, vfloat (&top)[V]) {
    for (int64_t chain = 0; chain < steps; chain += kChainSteps) {
        const int64_t end = chain + kChainSteps < steps ? chain + kChainSteps : steps;
        vfloat sum[N][V] = {};
        for (int64_t step = chain; step < end; step += kLineSteps) {
            for (int i = 0; i < 4; ++i) ahead[i].ask(step * 4);
            accumulate<Product, V, N>(queries + step * V * kLanes, keys + step * 4, row_bytes, 4,
                                      step + kLineSteps < end ? kLineSteps : end - step, sum);
        }
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                float* const at = scores + (n * V + v) * kLanes;
                if (chain) sum[n][v] = sum[n][v] + load(at);
                store(at, sum[n][v]);
                if (end == steps) top[v] = maximum(sum[n][v], top[v]);
            }
        }
    }
}

template <class Product, int V, int N>
FASTBERT_INLINE void score_rest(const float* queries, const char* keys, int64_t row_bytes, int64_t steps, int count,
                                const Ahead (&ahead)[4], float* scores, vfloat (&top)[V]) {
    if constexpr (N > 0) {
        if (count == N) {
            score<Product, V, N>(queries, keys, row_bytes, steps, ahead, scores, top);
        } else {
            score_rest<Product, V, N - 1>(queries, keys, row_bytes, steps, count, ahead, scores, top);
        }
    }
}

// Logits [count, V vectors] of queries [steps, V vectors] and `count` keys.
template <class Product, int V>
static __attribute__((noinline)) void score_block(const float* queries, const char* keys, int64_t row_bytes,
                                                  int64_t steps, int count, Ahead (&ahead)[4], float* scores,
                                                  vfloat (&top)[V]) {
    vfloat most[V];
    for (int v = 0; v < V; ++v) most[v] = splat(-__builtin_inff());
    for (; count >= kKeysAtOnce; count -= kKeysAtOnce) {
        score<Product, V, kKeysAtOnce>(queries, keys, row_bytes, steps, ahead, scores, most);
        for (int i = 0; i < 4; ++i) ahead[i].advance();
        keys += kKeysAtOnce * row_bytes;
        scores += kKeysAtOnce * V * kLanes;
    }
    score_rest<Product, V, kKeysAtOnce - 1>(queries, keys, row_bytes, steps, count, ahead, scores, most);
    for (int v = 0; v < V; ++v) top[v] = most[v];
}

// N columns of out [value_dim, V vectors]: out * decay + Σ weights * values.
template <class Product, int V, int N>
FASTBERT_INLINE void add_values(const float* weights, const char* values, int64_t row_bytes, int64_t steps, bool first,
                                const vfloat (&decay)[V], float* out) {
    vfloat sum[N][V] = {};
    accumulate<Product, V, N>(weights, values, 4, row_bytes, steps, sum);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            float* const at = out + (n * V + v) * kLanes;
            store(at, first ? sum[n][v] : fma(load(at), decay[v], sum[n][v]));
        }
    }
}

template <class Product, int V, int N>
FASTBERT_INLINE void add_values_rest(const float* weights, const char* values, int64_t row_bytes, int64_t steps,
                                     int count, bool first, const vfloat (&decay)[V], float* out) {
    if constexpr (N > 0) {
        if (count == N) {
            add_values<Product, V, N>(weights, values, row_bytes, steps, first, decay, out);
        } else {
            add_values_rest<Product, V, N - 1>(weights, values, row_bytes, steps, count, first, decay, out);
        }
    }
}

// out [value_dim, V vectors] = out * decay + Σ weights [steps, V vectors] * values [steps, value_dim].
template <class Product, int V>
static __attribute__((noinline)) void add_value_block(const float* weights, const char* values, int64_t row_bytes,
                                                      int64_t steps, int64_t value_dim, bool first,
                                                      const vfloat (&decay)[V], float* out) {
    for (; value_dim >= kValuesAtOnce; value_dim -= kValuesAtOnce) {
        add_values<Product, V, kValuesAtOnce>(weights, values, row_bytes, steps, first, decay, out);
        values += kValuesAtOnce * 4;
        out += kValuesAtOnce * V * kLanes;
    }
    add_values_rest<Product, V, kValuesAtOnce - 1>(weights, values, row_bytes, steps, (int)value_dim, first, decay,
                                                   out);
}

// ---- operands ----

// `count` <= kLanes steps of a row from element `first` on: one float32 or a pair of bfloat16 each.
FASTBERT_INLINE vfloat load_steps(Floats, const float* row, int64_t stride, int64_t first, int64_t, int count) {
    if (stride == 1) return count == kLanes ? load(row + first) : load_part(row + first, count);
    vfloat v = {};
    for (int i = 0; i < count; ++i) v[i] = row[(first + i) * stride];
    return v;
}

FASTBERT_INLINE vfloat load_steps(Floats, const bfloat16* row, int64_t stride, int64_t first, int64_t, int count) {
    if (stride == 1) return count == kLanes ? load(row + first) : load_part(row + first, count);
    vuint v = {};
    for (int i = 0; i < count; ++i) v[i] = (uint32_t)row[(first + i) * stride].bits << 16;
    return (vfloat)v;
}

#if defined(__AVX512BF16__)
FASTBERT_INLINE vfloat load_steps(Pairs, const bfloat16* row, int64_t stride, int64_t first, int64_t width, int count) {
    if (stride == 1 && first + 2 * count <= width) {
        return (vfloat)_mm512_maskz_loadu_epi32((__mmask16)((1u << count) - 1), row + first);
    }
    vuint v = {};
    for (int i = 0; i < count; ++i) {
        const int64_t at = first + 2 * i;
        v[i] = row[at * stride].bits;
        if (at + 1 < width) v[i] |= (uint32_t)row[(at + 1) * stride].bits << 16;
    }
    return (vfloat)v;
}
#endif

template <class Product>
FASTBERT_INLINE int64_t steps_of(int64_t elements) {
    return (elements + Product::kElements - 1) / Product::kElements;
}

FASTBERT_INLINE int lanes_of(int64_t left) {
    return (int)(left < kLanes ? left : kLanes);
}

// Queries [count, width], transposed: [steps, V vectors], with the bits of `sign` turned. Lanes behind `count` are 0.
template <class Product, int V, class T>
static __attribute__((noinline)) void transpose_queries(const T* queries, int64_t token, int64_t element, int count,
                                                        int64_t width, uint32_t sign, float* out) {
    const int64_t steps = steps_of<Product>(width);
    for (int v = 0; v < V; ++v) {
        for (int64_t step = 0; step < steps; step += kLanes) {
            const int wanted = lanes_of(steps - step);
            vfloat rows[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const int query = v * kLanes + i;
                rows[i] = vfloat{};
                if (query >= count) continue;
                const T* row = queries + query * token;
                rows[i] = load_steps(Product{}, row, element, step * Product::kElements, width, wanted);
                rows[i] = (vfloat)((vuint)rows[i] ^ sign);
            }
            transpose(rows);
            for (int i = 0; i < wanted; ++i) store(out + ((step + i) * V + v) * kLanes, rows[i]);
        }
    }
}

// Rows of keys: [rows, steps].
template <class Product, class T>
static __attribute__((noinline)) void pack_keys(const T* keys, int64_t token, int64_t element, int64_t rows,
                                                int64_t width, float* out) {
    const int64_t steps = steps_of<Product>(width);
    for (int64_t row = 0; row < rows; ++row, out += steps) {
        for (int64_t step = 0; step < steps; step += kLanes) {
            const int count = lanes_of(steps - step);
            store_part(out + step,
                       load_steps(Product{}, keys + row * token, element, step * Product::kElements, width, count),
                       count);
        }
    }
}

// Rows of values: [rows, width], of pairs of rows [rows / 2, width], the last of an odd number with zeros.
template <class T>
static __attribute__((noinline)) void pack_values(Floats, const T* values, int64_t token, int64_t element, int64_t rows,
                                                  int64_t width, float* out) {
    pack_keys<Floats>(values, token, element, rows, width, out);
}

#if defined(__AVX512BF16__)
static __attribute__((noinline)) void pack_values(Pairs, const bfloat16* values, int64_t token, int64_t element,
                                                  int64_t rows, int64_t width, float* out) {
    for (int64_t row = 0; row < rows; row += 2, out += width, values += 2 * token) {
        const bool paired = row + 1 < rows;
        int64_t column = 0;
        for (; element == 1 && paired && column + kLanes <= width; column += kLanes) {
            // widened, a bfloat16 stands in the upper half of its lane
            store(out + column, (vfloat)((vuint)load(values + column) >> 16 | (vuint)load(values + token + column)));
        }
        for (; column < width; column += kLanes) {
            const int count = lanes_of(width - column);
            const vuint even = (vuint)load_steps(Floats{}, values, element, column, width, count) >> 16;
            vuint odd = {};
            if (paired) odd = (vuint)load_steps(Floats{}, values + token, element, column, width, count);
            store_part(out + column, (vfloat)(even | odd), count);
        }
    }
}
#endif

FASTBERT_INLINE void store_lanes(float* at, vfloat v, int count) {
    if (count == kLanes) {
        store(at, v);
    } else {
        store_part(at, v, count);
    }
}

FASTBERT_INLINE void store_lanes(bfloat16* at, vfloat v, int count) {
    if (count == kLanes) {
#if defined(__AVX512BF16__)
        *(vshort_at*)at = (vshort)_mm512_cvtneps_pbh((__m512)v);  // denormals become zero, as in the products
#else
        *(vshort_at*)at = narrow(v);
#endif
    } else {
        store_part(at, v, count);
    }
}

// from [width, V vectors] * factor, transposed: out [count, width].
template <int V, class T>
static __attribute__((noinline)) void transpose_out(const float* from, const vfloat (&factor)[V], int count,
                                                    int64_t width, T* out, int64_t token) {
    for (int v = 0; v < V; ++v) {
        for (int64_t column = 0; column < width; column += kLanes) {
            const int wanted = lanes_of(width - column);
            vfloat rows[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                rows[i] = i < wanted ? load(from + ((column + i) * V + v) * kLanes) * factor[v] : vfloat{};
            }
            transpose(rows);
            for (int i = 0; i < kLanes && v * kLanes + i < count; ++i) {
                store_lanes(out + (v * kLanes + i) * token + column, rows[i], wanted);
            }
        }
    }
}

}  // namespace

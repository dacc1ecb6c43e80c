// Embedding kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "embedding.h"

#include "block_order.h"
#include "normalization.h"

namespace fastbert {
namespace {

// The sum of a token's embeddings, written down as it is taken.
template <class T>
struct SumRow {
    const T* rows[kTables];  // null: the table is absent
    const T* next_word;      // of the token after this one: the words lie all over memory
    float* wide;

    FASTBERT_INLINE_MEMBER block take(int64_t column) const {
        __builtin_prefetch(next_word + column);
        if (kBlock * sizeof(T) > 64) __builtin_prefetch(next_word + column + kLanes);
        block v = load_block(rows[0] + column);
        if (rows[1]) v = v + load_block(rows[1] + column);
        if (rows[2]) v = v + load_block(rows[2] + column);
        store_block(wide + column, v);
        return v;
    }
    FASTBERT_INLINE_MEMBER vfloat take_part(int64_t column, int count) const {
        vfloat v = load_part(rows[0] + column, count);
        if (rows[1]) v += load_part(rows[1] + column, count);
        if (rows[2]) v += load_part(rows[2] + column, count);
        store_part(wide + column, v, count);
        return v;
    }
};

template <class T>
FASTBERT_INLINE SumRow<T> sum_row(const Table (&tables)[kTables], int64_t token, int64_t tokens, float* wide) {
    SumRow<T> sum = {};
    for (int i = 0; i < kTables; ++i) {
        const Table& t = tables[i];
        sum.rows[i] = t.ids ? (const T*)t.data + t.ids[token] * t.stride : nullptr;
    }
    const int64_t next = token + 1 < tokens ? token + 1 : token;
    sum.next_word = (const T*)tables[0].data + tables[0].ids[next] * tables[0].stride;
    sum.wide = wide;
    return sum;
}

// As in layer_norm_kernels.cpp a row is read before the one before it is written.
template <class T>
void forward(const EmbeddingForward& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t padded = padded_width(a.width);
    float* const factors = scratch + 2 * padded;
    Normalization last = {};
    for (int64_t row = begin; row <= end; ++row) {
        Normalization n = {};
        if (row < end) {
            float* const wide = scratch + (row & 1) * padded;
            n = normalization(sum_row<T>(a.tables, row, a.tokens, wide), Row<float>{wide}, a.width, a.eps);
            if (a.mean) {
                a.mean[row] = n.shift + n.mean_d;
                a.rstd[row] = n.rstd;
            }
        }
        if (row > begin) {
            if (a.dropout.on) dropout_row<T>(a.dropout, row - 1, a.width, factors);
            normalize_row(scratch + ((row - 1) & 1) * padded, a.weight, a.bias, (T*)a.y + (row - 1) * a.width, a.width,
                          last, a.dropout.on ? factors : nullptr);
        }
        last = n;
    }
}

// ---- backward ----

struct Means2 {
    vfloat wdy, wdy_x_hat;  // means over a row
};

// x_hat and the gradient behind dropout replace the sum and the factors in scratch; dweight and dbias are added to.
template <class T>
FASTBERT_INLINE Means2 reduce_row(const EmbeddingBackward& a, int64_t row, const SumRow<T>& sum, float* gradients) {
    const T* const grad = (const T*)a.grad_y + row * a.grad_y_stride;
    const vfloat mean = splat(a.mean[row]), rstd = splat(a.rstd[row]);
    vfloat c1[2] = {}, c2[2] = {};
    int64_t column = 0;
    for (; column + kBlock <= a.width; column += kBlock) {
        const block total = sum.take(column), w = load_block(a.weight + column);
        block g = load_block(grad + column);
        if (a.dropout.on) g = g * load_block(gradients + column);
        const block x_hat = {(total.first - mean) * rstd, (total.second - mean) * rstd}, wdy = w * g;
        c1[0] += wdy.first;
        c1[1] += wdy.second;
        c2[0] = fma(wdy.first, x_hat.first, c2[0]);
        c2[1] = fma(wdy.second, x_hat.second, c2[1]);
        if (a.dweight) {
            store_block(a.dweight + column, load_block(a.dweight + column) + g * x_hat);
            store_block(a.dbias + column, load_block(a.dbias + column) + g);
        }
        store_block(sum.wide + column, x_hat);
        store_block(gradients + column, wdy);
    }
    for (; column < a.width; column += kLanes) {
        const int count = part_count(column, a.width);
        const vfloat total = sum.take_part(column, count), w = load_part(a.weight + column, count);
        vfloat g = load_part(grad + column, count);
        if (a.dropout.on) g *= load_part(gradients + column, count);
        const vfloat x_hat = (total - mean) * rstd, wdy = w * g;
        c1[0] += where(lanes_below(count), wdy);
        c2[0] += where(lanes_below(count), wdy * x_hat);
        if (a.dweight) {
            store_part(a.dweight + column, load_part(a.dweight + column, count) + g * x_hat, count);
            store_part(a.dbias + column, load_part(a.dbias + column, count) + g, count);
        }
        store_part(sum.wide + column, x_hat, count);
        store_part(gradients + column, wdy, count);
    }
    return {splat(sum_of_lanes(c1[0] + c1[1]) / (float)a.width), splat(sum_of_lanes(c2[0] + c2[1]) / (float)a.width)};
}

// d_total = rstd * (wdy - mean(wdy) - x_hat * mean(wdy * x_hat))
template <class T>
void backward(const EmbeddingBackward& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t padded = padded_width(a.width);
    float* const wide = scratch;
    float* const gradients = scratch + padded;
    for (int64_t row = begin; row < end; ++row) {
        if (a.dropout.on) dropout_row<T>(a.dropout, row, a.width, gradients);
        const Means2 means = reduce_row(a, row, sum_row<T>(a.tables, row, a.tokens, wide), gradients);
        if (!a.d_total) continue;
        float* const d_total = a.d_total + row * padded;
        const vfloat rstd = splat(a.rstd[row]);
        int64_t column = 0;
        for (; column + kBlock <= a.width; column += kBlock) {
            const block x_hat = load_block(wide + column), wdy = load_block(gradients + column);
            store_natural<T>(d_total + column, {rstd * (wdy.first - fma(x_hat.first, means.wdy_x_hat, means.wdy)),
                                                rstd * (wdy.second - fma(x_hat.second, means.wdy_x_hat, means.wdy))});
        }
        for (; column < a.width; column += kLanes) {
            const int count = part_count(column, a.width);
            const vfloat x_hat = load_part(wide + column, count), wdy = load_part(gradients + column, count);
            store_part(d_total + column, rstd * (wdy - fma(x_hat, means.wdy_x_hat, means.wdy)), count);
        }
    }
}

// No chain of additions is longer than a segment, nor its rounding error.
constexpr int64_t kSegmentRows = 64;

void sum_selected(const float* matrix, int64_t stride, const int64_t* rows, int64_t count, int64_t begin, int64_t end,
                  float* sum) {
    for (int64_t column = begin; column < end; column += kLanes) {
        const int part = part_count(column, end);
        vfloat total = {};
        for (int64_t first = 0; first < count; first += kSegmentRows) {
            const int64_t last = first + kSegmentRows < count ? first + kSegmentRows : count;
            vfloat segment = {};
            for (int64_t i = first; i < last; ++i) segment += load_part(matrix + rows[i] * stride + column, part);
            total += segment;
        }
        store_part(sum + column, total, part);
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const EmbeddingKernels embedding_kernels;
const EmbeddingKernels embedding_kernels = {
    {forward<float>, forward<bfloat16>},
    {backward<float>, backward<bfloat16>},
    sum_selected,
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

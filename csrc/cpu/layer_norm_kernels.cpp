// Layer norm kernels of one instruction set. Compiled once for each, with FASTBERT_ISA naming it: see simd.h for what
// such a file may not do.
#include "layer_norm.h"
#include "normalization.h"

namespace fastbert {
namespace {

// ---- rows: where the first sweep gets its vectors from ----

// residual + dropout(x + x_bias), written down as it is taken. kPlain: without bias and dropout.
template <class T, bool kPlain>
struct AddRow {
    const T* x;
    const T* residual;
    const float* x_bias;   // or null
    const float* factors;  // of dropout, or null
    T* sum;                // rounded; or null
    bool stream_sum;       // past the caches
    float* wide;           // unrounded; or null

    FASTBERT_INLINE_MEMBER block take(int64_t column) const {
        block v = load_block(x + column);
        if (!kPlain && x_bias) v = v + load_block(x_bias + column);
        if (!kPlain && factors) v = v * load_block(factors + column);
        v = v + load_block(residual + column);
        if (stream_sum) {
            stream_block(sum + column, v);
        } else if (sum) {
            store_block(sum + column, v);
        }
        if (wide) store_block(wide + column, v);
        return v;
    }
    FASTBERT_INLINE_MEMBER vfloat take_part(int64_t column, int count) const {
        vfloat v = load_part(x + column, count);
        if (!kPlain && x_bias) v += load_part(x_bias + column, count);
        if (!kPlain && factors) v *= load_part(factors + column, count);
        v += load_part(residual + column, count);
        if (sum) store_part(sum + column, v, count);
        if (wide) store_part(wide + column, v, count);
        return v;
    }
};

// Both forward kernels read a row before they write the one before it: the statistics of a row end in a long chain of
// dependent operations, and the processor fills the wait with the next row's sums.

template <class T>
void forward(const LayerNormForward& a, int64_t begin, int64_t end) {
    Normalization last = {};
    for (int64_t row = begin; row <= end; ++row) {
        Normalization n = {};
        if (row < end) {
            const Row<T> x = {(const T*)a.x + row * a.x_stride};
            n = normalization(x, x, a.width, a.eps);
            if (a.mean) {
                a.mean[row] = n.shift + n.mean_d;
                a.rstd[row] = n.rstd;
            }
        }
        if (row > begin) {
            normalize_row((const T*)a.x + (row - 1) * a.x_stride, a.weight, a.bias, (T*)a.y + (row - 1) * a.width,
                          a.width, last);
        }
        last = n;
    }
}

// ---- forward with addition ----

template <class T, bool kPlain>
FASTBERT_INLINE void add_forward_rows(const AddLayerNormForward& a, int64_t begin, int64_t end, float* scratch) {
    float* const factors = scratch + 2 * padded_width(a.width);
    // Where the unrounded sums of a row are kept until it is written. The rounded ones of float32 are the same.
    const bool sum_is_exact = sizeof(T) == sizeof(float) && a.sum && !a.stream_sum;
    const auto wide_row = [&](int64_t row) {
        return sum_is_exact ? (float*)a.sum + row * a.width : scratch + (row & 1) * padded_width(a.width);
    };
    Normalization last = {};
    for (int64_t row = begin; row <= end; ++row) {
        Normalization n = {};
        if (row < end) {
            AddRow<T, kPlain> in = {};
            in.x = (const T*)a.x + row * a.x_stride;
            in.residual = (const T*)a.residual + row * a.residual_stride;
            in.sum = a.sum ? (T*)a.sum + row * a.width : nullptr;
            in.stream_sum = a.stream_sum;
            in.wide = sum_is_exact ? nullptr : wide_row(row);
            if (!kPlain) {
                in.x_bias = a.x_bias;
                if (a.dropout.on) {
                    dropout_row<T>(a.dropout, row, a.width, factors);
                    in.factors = factors;
                }
            }
            n = normalization(in, Row<float>{wide_row(row)}, a.width, a.eps);
            if (a.mean) {
                a.mean[row] = n.shift + n.mean_d;
                a.rstd[row] = n.rstd;
            }
        }
        if (row > begin) {
            normalize_row(wide_row(row - 1), a.weight, a.bias, (T*)a.y + (row - 1) * a.width, a.width, last);
        }
        last = n;
    }
    if (a.stream_sum) stream_end();
}

template <class T>
void add_forward(const AddLayerNormForward& a, int64_t begin, int64_t end, float* scratch) {
    if (a.x_bias || a.dropout.on) {
        add_forward_rows<T, false>(a, begin, end, scratch);
    } else {
        add_forward_rows<T, true>(a, begin, end, scratch);
    }
}

// ---- backward ----

// Rows in flight: dweight and dbias are read and written once for all of them. Four want 32 vector registers.
constexpr int kRows = kLanes == 16 ? 4 : 2;
static_assert(kRows <= kMostRows, "scratch of add_backward");

template <class T, int kCount>
struct BackwardRows {
    const T* grad_y[kCount];
    const T* sum[kCount];
    vfloat mean[kCount], rstd[kCount];
    vfloat c1[kCount], c2[kCount];  // sums of wdy and of wdy * x_hat; later their means
};

// One vector of a row, and what belongs to it.
template <class T, int kCount>
FASTBERT_INLINE void reduce(BackwardRows<T, kCount>& rows, int r, vfloat grad_y, vfloat sum, vfloat weight,
                            vfloat* dweight, vfloat* dbias) {
    const vfloat x_hat = (sum - rows.mean[r]) * rows.rstd[r];
    const vfloat wdy = weight * grad_y;
    rows.c1[r] += wdy;
    rows.c2[r] = fma(wdy, x_hat, rows.c2[r]);
    *dweight = fma(grad_y, x_hat, *dweight);
    *dbias += grad_y;
}

// First sweep: c1, c2, dweight and dbias.
template <class T, int kCount>
FASTBERT_INLINE void reduce_rows(const AddLayerNormBackward& a, BackwardRows<T, kCount>& rows) {
    int64_t column = 0;
    for (; column + kBlock <= a.width; column += kBlock) {
        const block weight = load_block(a.weight + column);
        block dweight = {}, dbias = {};
        if (a.dweight) {
            dweight = load_block(a.dweight + column);
            dbias = load_block(a.dbias + column);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
            const block grad_y = load_block(rows.grad_y[r] + column), sum = load_block(rows.sum[r] + column);
            reduce(rows, r, grad_y.first, sum.first, weight.first, &dweight.first, &dbias.first);
            reduce(rows, r, grad_y.second, sum.second, weight.second, &dweight.second, &dbias.second);
        }
        if (a.dweight) {
            store_block(a.dweight + column, dweight);
            store_block(a.dbias + column, dbias);
        }
    }
    for (; column < a.width; column += kLanes) {
        const int count = part_count(column, a.width);
        const vfloat weight = load_part(a.weight + column, count);
        vfloat dweight = {}, dbias = {};
        if (a.dweight) {
            dweight = load_part(a.dweight + column, count);
            dbias = load_part(a.dbias + column, count);
        }
        for (int r = 0; r < kCount; ++r) {
            reduce(rows, r, load_part(rows.grad_y[r] + column, count), load_part(rows.sum[r] + column, count), weight,
                   &dweight, &dbias);
        }
        if (a.dweight) {
            store_part(a.dweight + column, dweight, count);
            store_part(a.dbias + column, dbias, count);
        }
    }
}

template <class T, int kCount>
FASTBERT_INLINE vfloat d_sum_of(const BackwardRows<T, kCount>& rows, int r, vfloat grad_y, vfloat sum, vfloat weight) {
    const vfloat x_hat = (sum - rows.mean[r]) * rows.rstd[r];
    const vfloat wdy = weight * grad_y;
    return rows.rstd[r] * (wdy - fma(x_hat, rows.c2[r], rows.c1[r]));
}

// Second sweep: dresidual, dx and dx_bias. kPlain: dresidual alone, and no grad_sum.
template <bool kPlain, class T, int kCount>
FASTBERT_INLINE void write_rows(const AddLayerNormBackward& a, const BackwardRows<T, kCount>& rows, int64_t row,
                                const float* factors) {
    int64_t column = 0;
    for (; column + kBlock <= a.width; column += kBlock) {
        const block weight = load_block(a.weight + column);
        block dx_bias = {};
        if (!kPlain && a.dx_bias) dx_bias = load_block(a.dx_bias + column);
#pragma GCC unroll 4
        for (int r = 0; r < kCount; ++r) {
            const block grad_y = load_block(rows.grad_y[r] + column), sum = load_block(rows.sum[r] + column);
            block d_sum = {d_sum_of(rows, r, grad_y.first, sum.first, weight.first),
                           d_sum_of(rows, r, grad_y.second, sum.second, weight.second)};
            const int64_t at = (row + r) * a.width + column;
            if (kPlain) {
                store_block((T*)a.dresidual + at, d_sum);
                continue;
            }
            if (a.grad_sum) {
                const block g = load_block((const T*)a.grad_sum + (row + r) * a.grad_sum_stride + column);
                d_sum = d_sum + g;
            }
            if (a.dresidual) store_block((T*)a.dresidual + at, d_sum);
            block dx = d_sum;
            if (a.dropout.on) {
                const block f = load_block(factors + r * padded_width(a.width) + column);
                dx = dx * f;
            }
            if (a.dx) store_block((T*)a.dx + at, dx);
            dx_bias = dx_bias + dx;
        }
        if (!kPlain && a.dx_bias) store_block(a.dx_bias + column, dx_bias);
    }
    for (; column < a.width; column += kLanes) {
        const int count = part_count(column, a.width);
        const vfloat weight = load_part(a.weight + column, count);
        vfloat dx_bias = {};
        if (a.dx_bias) dx_bias = load_part(a.dx_bias + column, count);
        for (int r = 0; r < kCount; ++r) {
            vfloat d_sum = d_sum_of(rows, r, load_part(rows.grad_y[r] + column, count),
                                    load_part(rows.sum[r] + column, count), weight);
            const int64_t at = (row + r) * a.width + column;
            if (a.grad_sum) {
                d_sum += load_part((const T*)a.grad_sum + (row + r) * a.grad_sum_stride + column, count);
            }
            if (a.dresidual) store_part((T*)a.dresidual + at, d_sum, count);
            vfloat dx = d_sum;
            if (a.dropout.on) dx *= load_part(factors + r * padded_width(a.width) + column, count);
            if (a.dx) store_part((T*)a.dx + at, dx, count);
            dx_bias += dx;
        }
        if (a.dx_bias) store_part(a.dx_bias + column, dx_bias, count);
    }
}

template <bool kPlain, class T, int kCount>
FASTBERT_INLINE void backward_rows(const AddLayerNormBackward& a, int64_t row, float* scratch) {
    BackwardRows<T, kCount> rows;
    for (int r = 0; r < kCount; ++r) {
        rows.grad_y[r] = (const T*)a.grad_y + (row + r) * a.grad_y_stride;
        rows.sum[r] = (const T*)a.sum + (row + r) * a.sum_stride;
        rows.mean[r] = splat(a.mean[row + r]);
        rows.rstd[r] = splat(a.rstd[row + r]);
        rows.c1[r] = rows.c2[r] = vfloat{};
    }
    reduce_rows(a, rows);
    if (!a.dresidual && !a.dx && !a.dx_bias) return;
    for (int r = 0; r < kCount; ++r) {
        rows.c1[r] = splat(sum_of_lanes(rows.c1[r]) / (float)a.width);
        rows.c2[r] = splat(sum_of_lanes(rows.c2[r]) / (float)a.width);
        if (!kPlain && a.dropout.on) dropout_row<T>(a.dropout, row + r, a.width, scratch + r * padded_width(a.width));
    }
    write_rows<kPlain>(a, rows, row, scratch);
}

template <bool kPlain, class T>
FASTBERT_INLINE void backward_range(const AddLayerNormBackward& a, int64_t begin, int64_t end, float* scratch) {
    int64_t row = begin;
    for (; row + kRows <= end; row += kRows) backward_rows<kPlain, T, kRows>(a, row, scratch);
    for (; row < end; ++row) backward_rows<kPlain, T, 1>(a, row, scratch);
}

template <class T>
void add_backward(const AddLayerNormBackward& a, int64_t begin, int64_t end, float* scratch) {
    if (a.dresidual && !a.grad_sum && !a.dx && !a.dx_bias) {
        backward_range<true, T>(a, begin, end, scratch);
    } else {
        backward_range<false, T>(a, begin, end, scratch);
    }
}

// ---- small helpers of the drivers ----

void philox(uint64_t seed, uint64_t counter, int64_t blocks, uint32_t* words) {
    for (int64_t i = 0; i < blocks; ++i) {
        const WordBlock w = natural_order(philox_words(seed, counter + (uint64_t)i * (kBlock / 4)));
        *(vuint_at*)(words + i * kBlock) = w.first;
        *(vuint_at*)(words + i * kBlock + kLanes) = w.second;
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const LayerNormKernels layer_norm_kernels;
const LayerNormKernels layer_norm_kernels = {
    philox,
    kBlock,
    {forward<float>, forward<bfloat16>},
    {add_forward<float>, add_forward<bfloat16>},
    {add_backward<float>, add_backward<bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

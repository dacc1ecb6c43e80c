// Statistics and normalisation of a row, and its dropout factors: what every kernel with a layer norm does. For files
// that are compiled once for each instruction set, like simd.h.
#pragma once

#include "philox.h"
#include "simd.h"
#include "types.h"

namespace fastbert {
namespace {

// A row in memory.
template <class T>
struct Row {
    const T* x;

    FASTBERT_INLINE_MEMBER block take(int64_t column) const { return load_block(x + column); }
    FASTBERT_INLINE_MEMBER vfloat take_part(int64_t column, int count) const { return load_part(x + column, count); }
};

// ---- statistics of a row ----

// Means of d and of d * d with d = x - shift, over one row.
struct Means {
    float d, square;
};

// Sums of sums: no chain of additions is longer than this, nor its rounding error.
constexpr int kSegment = 16;

template <bool kShifted, class Source>
FASTBERT_INLINE Means means_of(const Source& source, int64_t width, float shift) {
    const vfloat s = splat(shift);
    vfloat sum[4] = {}, squares[4] = {};  // independent additions, to hide their latency
    int64_t column = 0;
    while (column + 2 * kBlock <= width) {
        vfloat part_sum[4] = {}, part_squares[4] = {};
        for (int i = 0; i < kSegment && column + 2 * kBlock <= width; ++i, column += 2 * kBlock) {
            const block v = source.take(column), w = source.take(column + kBlock);
            const vfloat x[4] = {v.first, v.second, w.first, w.second};
#pragma GCC unroll 4
            for (int chain = 0; chain < 4; ++chain) {
                const vfloat d = kShifted ? x[chain] - s : x[chain];
                part_sum[chain] += d;
                part_squares[chain] = fma(d, d, part_squares[chain]);
            }
        }
        for (int chain = 0; chain < 4; ++chain) {
            sum[chain] += part_sum[chain];
            squares[chain] += part_squares[chain];
        }
    }
    for (; column + kBlock <= width; column += kBlock) {
        const block v = source.take(column);
        const vfloat x[2] = {v.first, v.second};
#pragma GCC unroll 2
        for (int chain = 0; chain < 2; ++chain) {
            const vfloat d = kShifted ? x[chain] - s : x[chain];
            sum[chain] += d;
            squares[chain] = fma(d, d, squares[chain]);
        }
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        const vfloat x = source.take_part(column, count);
        const vfloat d = kShifted ? where(lanes_below(count), x - s) : x;  // lanes behind the end are 0
        sum[2] += d;
        squares[2] = fma(d, d, squares[2]);
    }
    const float per_width = 1.0f / (float)width;
    return {sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) * per_width,
            sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) * per_width};
}

// x_hat = (x - shift) * rstd - mean_d * rstd, where mean_d = mean - shift. The shift is 0 for most rows.
struct Normalization {
    float shift, mean_d, rstd;
};

// One sweep gives mean and variance = E[x^2] - mean^2, as long as mean^2 is at most this many variances: then the
// difference loses at most log2(1 + this) bits. Rows further from zero get a second sweep over x - mean.
constexpr float kFarFromZero = 4.0f;

// `again` is the row that `source` read or wrote.
template <class Source, class Again>
FASTBERT_INLINE Normalization normalization(const Source& source, Row<Again> again, int64_t width, float eps) {
    float shift = 0.0f;
    Means means = means_of<false>(source, width, 0.0f);
    float variance = means.square - means.d * means.d;
    if (!(means.d * means.d <= kFarFromZero * variance)) {  // (also when anything is NaN)
        shift = means.d;
        means = means_of<true>(again, width, shift);
        variance = means.square - means.d * means.d;
    }
    if (variance < 0.0f) variance = 0.0f;  // a constant row, by rounding; NaN stays
    return {shift, means.d, 1.0f / square_root(variance + eps)};
}

// y = (x_hat * weight + bias) * factors over one row; factors may be null.
template <bool kShifted, class In, class Out>
FASTBERT_INLINE void normalize(const In* x, const float* weight, const float* bias, Out* y, int64_t width,
                               const Normalization& n, const float* factors) {
    const vfloat shift = splat(n.shift), rstd = splat(n.rstd), minus_mean = splat(-n.mean_d * n.rstd);
    int64_t column = 0;
#pragma GCC unroll 2
    for (; column + kBlock <= width; column += kBlock) {
        const block v = load_block(x + column), w = load_block(weight + column), b = load_block(bias + column);
        const block d = kShifted ? block{v.first - shift, v.second - shift} : v;
        const block x_hat = {fma(d.first, rstd, minus_mean), fma(d.second, rstd, minus_mean)};
        block out = {fma(x_hat.first, w.first, b.first), fma(x_hat.second, w.second, b.second)};
        if (factors) out = out * load_block(factors + column);
        store_block(y + column, out);
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        const vfloat v = load_part(x + column, count);
        const vfloat x_hat = fma(kShifted ? v - shift : v, rstd, minus_mean);
        vfloat out = fma(x_hat, load_part(weight + column, count), load_part(bias + column, count));
        if (factors) out *= load_part(factors + column, count);
        store_part(y + column, out, count);
    }
}

template <class In, class Out>
FASTBERT_INLINE void normalize_row(const In* x, const float* weight, const float* bias, Out* y, int64_t width,
                                   const Normalization& n, const float* factors = nullptr) {
    if (n.shift == 0.0f) {
        normalize<false>(x, weight, bias, y, width, n, factors);
    } else {
        normalize<true>(x, weight, bias, y, width, n, factors);
    }
}

// ---- dropout ----

// Factors of one row of T in block order: `scale` where kept, 0 where dropped. Writes whole blocks.
template <class T>
FASTBERT_INLINE void dropout_row(const Dropout& dropout, int64_t row, int64_t width, float* factors) {
    const vuint threshold = splat(dropout.threshold);
    const vfloat scale = splat(dropout.scale);
    uint64_t counter = dropout.offset / 4 + (uint64_t)row * ((uint64_t)(width + 3) / 4);
    for (int64_t column = 0; column < width; column += kBlock, counter += kBlock / 4) {
        const PhiloxWords words = philox_words(dropout.seed, counter);
        const bool natural = sizeof(T) == sizeof(float) || column + kBlock > width;
        const WordBlock w = natural ? natural_order(words) : even_odd_order(words);
        store_block(factors + column,
                    {where((vint)(w.first >= threshold), scale), where((vint)(w.second >= threshold), scale)});
    }
}

}  // namespace
}  // namespace fastbert

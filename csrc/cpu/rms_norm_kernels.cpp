// RMS norm kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "rms_norm.h"

#include "simd.h"

namespace fastbert {
namespace {

// Sums over a row, in four independent chains to hide their latency. The terms are added by `blocks` and, behind the
// last whole block, by `parts`.
template <class Blocks, class Parts>
FASTBERT_INLINE float sum_row(int64_t width, const Blocks& blocks, const Parts& parts) {
    block sum[2] = {};
    int64_t column = 0;
    for (; column + 2 * kBlock <= width; column += 2 * kBlock) {
        sum[0] = blocks(column, sum[0]);
        sum[1] = blocks(column + kBlock, sum[1]);
    }
    for (; column + kBlock <= width; column += kBlock) sum[0] = blocks(column, sum[0]);
    for (; column < width; column += kLanes) sum[1].first = parts(column, part_count(column, width), sum[1].first);
    const block all = sum[0] + sum[1];
    return sum_of_lanes(all.first + all.second);
}

FASTBERT_INLINE block fma_block(block a, block b, block c) {
    return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
}

FASTBERT_INLINE block scaled(block a, vfloat b) {
    return {a.first * b, a.second * b};
}

template <class T>
void forward(const RmsNormForward& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* const x = (const T*)a.x + row * a.x_stride;
        T* const y = (T*)a.y + row * a.width;
        const float squares = sum_row(
            a.width,
            [&](int64_t column, block sum) __attribute__((always_inline)) {
                const block v = load_block(x + column);
                return fma_block(v, v, sum);
            },
            [&](int64_t column, int count, vfloat sum) __attribute__((always_inline)) {
                const vfloat v = load_part(x + column, count);
                return fma(v, v, sum);
            });
        const float rstd = 1.0f / square_root(squares / (float)a.width + a.eps);
        if (a.rstd) a.rstd[row] = rstd;
        const vfloat r = splat(rstd);
        int64_t column = 0;
        for (; column + kBlock <= a.width; column += kBlock) {
            store_block(y + column, scaled(load_block(x + column), r) * load_block(a.weight + column));
        }
        for (; column < a.width; column += kLanes) {
            const int count = part_count(column, a.width);
            store_part(y + column, load_part(x + column, count) * r * load_part(a.weight + column, count), count);
        }
    }
}

// dx = rstd * (wdy - x_hat * mean(wdy * x_hat)) with x_hat = x * rstd and wdy = weight * grad_y.
template <class T>
void backward(const RmsNormBackward& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* const grad = (const T*)a.grad_y + row * a.grad_y_stride;
        const T* const x = (const T*)a.x + row * a.x_stride;
        const vfloat rstd = splat(a.rstd[row]);
        const float dot = sum_row(
            a.width,
            [&](int64_t column, block sum) __attribute__((always_inline)) {
                const block g = load_block(grad + column), x_hat = scaled(load_block(x + column), rstd);
                if (a.dweight) store_block(a.dweight + column, fma_block(g, x_hat, load_block(a.dweight + column)));
                return fma_block(g * load_block(a.weight + column), x_hat, sum);
            },
            [&](int64_t column, int count, vfloat sum) __attribute__((always_inline)) {
                const vfloat g = load_part(grad + column, count), x_hat = load_part(x + column, count) * rstd;
                if (a.dweight) {
                    store_part(a.dweight + column, fma(g, x_hat, load_part(a.dweight + column, count)), count);
                }
                return fma(g * load_part(a.weight + column, count), x_hat, sum);
            });
        if (!a.dx) continue;
        T* const dx = (T*)a.dx + row * a.width;
        const vfloat minus_mean = splat(-dot / (float)a.width);
        int64_t column = 0;
        for (; column + kBlock <= a.width; column += kBlock) {
            const block wdy = load_block(grad + column) * load_block(a.weight + column);
            store_block(dx + column,
                        scaled(fma_block(scaled(load_block(x + column), rstd), {minus_mean, minus_mean}, wdy), rstd));
        }
        for (; column < a.width; column += kLanes) {
            const int count = part_count(column, a.width);
            const vfloat wdy = load_part(grad + column, count) * load_part(a.weight + column, count);
            store_part(dx + column, fma(load_part(x + column, count) * rstd, minus_mean, wdy) * rstd, count);
        }
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const RmsNormKernels rms_norm_kernels;
const RmsNormKernels rms_norm_kernels = {
    {forward<float>, forward<bfloat16>},
    {backward<float>, backward<bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

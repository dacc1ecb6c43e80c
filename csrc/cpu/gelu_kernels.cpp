// GELU kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "distributions.h"
#include "gelu.h"
#include "simd.h"

namespace fastbert {
namespace {

// z * P(Z < z) for a standard normal Z.
struct Erf {
    static FASTBERT_INLINE_MEMBER vfloat value(vfloat z) {
        return z * tails(z, lower_normal_tail(z, bell(z))).p;
    }
    static FASTBERT_INLINE_MEMBER vfloat derivative(vfloat z) {
        const vfloat b = bell(z);
        return fma(z * b, splat(0.3989422804f), tails(z, lower_normal_tail(z, b)).p);  // 1 / sqrt(2 pi)
    }
};

// z * (1 + tanh(u)) / 2 = z * logistic(2 u), with 2 u = z (a + b z^2).
struct Tanh {
    static constexpr float kA = 1.5957691216f;                // 2 sqrt(2 / pi)
    static constexpr float kB = 1.5957691216f * 0.044715f;
    static FASTBERT_INLINE_MEMBER vfloat value(vfloat z) {
        return z * logistic(z * fma(z * z, splat(kB), splat(kA))).p;
    }
    static FASTBERT_INLINE_MEMBER vfloat derivative(vfloat z) {
        const vfloat square = z * z;
        const Tails s = logistic(z * fma(square, splat(kB), splat(kA)));
        // Far out s.p * s.q is 0, and the square must not overflow.
        const vfloat slope = fma(minimum(splat(1e6f), square), splat(3.0f * kB), splat(kA));
        return fma(z * s.q * s.p, slope, s.p);
    }
};

struct Quick {
    static constexpr float kSlope = 1.702f;
    static FASTBERT_INLINE_MEMBER vfloat value(vfloat z) { return z * logistic(z * kSlope).p; }
    static FASTBERT_INLINE_MEMBER vfloat derivative(vfloat z) {
        const Tails s = logistic(z * kSlope);
        return fma(z * s.q * s.p, splat(kSlope), s.p);
    }
};

template <class T, class Activation>
void forward(const void* x_row, const float* bias, void* y_row, int64_t width) {
    const T* const x = (const T*)x_row;
    T* const y = (T*)y_row;
    int64_t column = 0;
    for (; column + kBlock <= width; column += kBlock) {
        block z = load_block(x + column);
        if (bias) z = z + load_block(bias + column);
        store_block(y + column, {Activation::value(z.first), Activation::value(z.second)});
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        vfloat z = load_part(x + column, count);
        if (bias) z += load_part(bias + column, count);
        store_part(y + column, Activation::value(z), count);
    }
}

template <class T, class Activation>
void backward(const void* grad_row, const void* x_row, const float* bias, void* dx_row, float* dbias, int64_t width) {
    const T* const grad = (const T*)grad_row;
    const T* const x = (const T*)x_row;
    T* const dx = (T*)dx_row;
    int64_t column = 0;
    for (; column + kBlock <= width; column += kBlock) {
        block z = load_block(x + column);
        if (bias) z = z + load_block(bias + column);
        const block derivative = {Activation::derivative(z.first), Activation::derivative(z.second)};
        const block dz = load_block(grad + column) * derivative;
        if (dx) store_block(dx + column, dz);
        if (dbias) store_block(dbias + column, load_block(dbias + column) + dz);
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        vfloat z = load_part(x + column, count);
        if (bias) z += load_part(bias + column, count);
        const vfloat dz = load_part(grad + column, count) * Activation::derivative(z);
        if (dx) store_part(dx + column, dz, count);
        if (dbias) store_part(dbias + column, load_part(dbias + column, count) + dz, count);
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const GeluKernels gelu_kernels;
const GeluKernels gelu_kernels = {
    {{forward<float, Erf>, forward<float, Tanh>, forward<float, Quick>},
     {forward<bfloat16, Erf>, forward<bfloat16, Tanh>, forward<bfloat16, Quick>}},
    {{backward<float, Erf>, backward<float, Tanh>, backward<float, Quick>},
     {backward<bfloat16, Erf>, backward<bfloat16, Tanh>, backward<bfloat16, Quick>}},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

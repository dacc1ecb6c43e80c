// Activations with their derivatives. For files that are compiled once for each instruction set, like simd.h.
#pragma once

#include "distributions.h"
#include "simd.h"

namespace {

struct Slope {
    vfloat value, derivative;  // of an activation
};

// z * P(Z < z) for a standard normal Z.
struct ErfGelu {
    static FASTBERT_INLINE_MEMBER Slope at(vfloat z) {
        const vfloat b = bell(z), p = tails(z, lower_normal_tail(z, b)).p;
        return {z * p, fma(z * b, splat(0.3989422804f), p)};  // 1 / sqrt(2 pi)
    }
};

// z * (1 + tanh(u)) / 2 = z * logistic(2 u), with 2 u = z (a + b z^2).
struct TanhGelu {
    static FASTBERT_INLINE_MEMBER Slope at(vfloat z) {
        constexpr float kA = 1.5957691216f, kB = 1.5957691216f * 0.044715f;  // a = 2 sqrt(2 / pi)
        const vfloat square = z * z;
        const Tails s = logistic(z * fma(square, splat(kB), splat(kA)));
        // Far out s.p * s.q is 0, and the square must not overflow.
        const vfloat slope = fma(minimum(splat(1e6f), square), splat(3.0f * kB), splat(kA));
        return {z * s.p, fma(z * s.q * s.p, slope, s.p)};
    }
};

FASTBERT_INLINE Slope scaled_silu(vfloat z, float scale) {
    const Tails s = logistic(z * scale);
    return {z * s.p, fma(z * s.q * s.p, splat(scale), s.p)};
}

struct QuickGelu {
    static FASTBERT_INLINE_MEMBER Slope at(vfloat z) { return scaled_silu(z, 1.702f); }
};

struct Silu {
    static FASTBERT_INLINE_MEMBER Slope at(vfloat z) { return scaled_silu(z, 1.0f); }
};

struct Sigmoid {
    static FASTBERT_INLINE_MEMBER Slope at(vfloat z) {
        const Tails s = logistic(z);
        return {s.p, s.p * s.q};
    }
};

struct Relu {
    static FASTBERT_INLINE_MEMBER Slope at(vfloat z) {
        return {z <= 0.0f ? vfloat{} : z, where((vint)(z > 0.0f), splat(1.0f))};  // NaN stays
    }
};

FASTBERT_INLINE vfloat hyperbolic_tangent(vfloat z) {
    const vfloat t = absolute(z), square = z * z;
    // (tanh(z) / z - 1) / z^2 on [0, 0.625]; minimax, error 4.1e-9 once multiplied by z^2
    vfloat p = splat(-0x1.76ac1ap-8f);
    p = fma(p, square, splat(0x1.5256d8p-6f));
    p = fma(p, square, splat(-0x1.b84448p-5f));
    p = fma(p, square, splat(0x1.110768p-3f));
    p = fma(p, square, splat(-0x1.555534p-2f));
    const vfloat near = fma(p * square, z, z);
    const vfloat e = exponential(-2.0f * t);
    const vfloat far = (1.0f - e) * reciprocal(1.0f + e);
    const vfloat signed_far = (vfloat)((vuint)far | ((vuint)z & 0x80000000u));
    return t < 0.625f ? near : signed_far;
}

}  // namespace

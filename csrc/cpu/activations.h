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

}  // namespace

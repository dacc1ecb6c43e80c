// Activation functions, vectorised. For files that are compiled once for each instruction set, like simd.h.
//
// The polynomials are minimax fits (Lawson's iteration) on the ranges given; their errors are those before rounding.
#pragma once

#include "simd.h"

namespace fastbert {
namespace {

// Numbers of fastbert/cpu/linear.py's ACTIVATIONS.
enum Activation : int { kNone = 0, kRelu, kGelu, kGeluTanh, kGeluQuick, kSilu, kTanh, kActivations };

FASTBERT_INLINE vfloat choose(vint mask, vfloat a, vfloat b) {
    return (vfloat)(((vuint)a & (vuint)mask) | ((vuint)b & ~(vuint)mask));
}

FASTBERT_INLINE vfloat magnitude(vfloat v) {
    return (vfloat)((vuint)v & 0x7fffffffu);
}

// 2^x, 1 ulp; 0 and infinity beyond float32's range, NaN for NaN.
FASTBERT_INLINE vfloat power_of_two(vfloat x) {
    const vfloat low = splat(-151.0f), high = splat(129.0f);
    const vfloat bounded = choose(x < low, low, choose(x > high, high, x));
    const vfloat magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vfloat shifted = bounded + magic;
    const vfloat f = bounded - (shifted - magic);  // [-1/2, 1/2], where the fit's relative error is 1.9e-9
    vfloat p = splat(0x1.41d334p-13f);
    p = fma(p, f, splat(0x1.5f456ap-10f));
    p = fma(p, f, splat(0x1.3b2dbcp-7f));
    p = fma(p, f, splat(0x1.c6aed4p-5f));
    p = fma(p, f, splat(0x1.ebfbdap-3f));
    p = fma(p, f, splat(0x1.62e430p-1f));
    p = fma(p, f, splat(1.0f));
    // Two factors, for the exponent's own range is narrower than that of 2^x with its denormal numbers.
    const vint exponent = (vint)shifted - (vint)magic;
    const vint half = exponent >> 1;
    return p * (vfloat)((half + 127) << 23) * (vfloat)((exponent - half + 127) << 23);
}

constexpr float kLog2E = 1.44269504088896341f;

// 1 / (1 + e^-x)
FASTBERT_INLINE vfloat sigmoid(vfloat x) {
    return 1.0f / (1.0f + power_of_two(x * -kLog2E));
}

// 1 + erf(x / sqrt(2)), twice the normal distribution function.
FASTBERT_INLINE vfloat one_plus_erf(vfloat x) {
    constexpr float kSwitch = 1.2f, kEnd = 8.0f;
    const vfloat t = magnitude(x), s = x * x;
    // erf(x / sqrt(2)) / x on [0, 1.2]: absolute error 2.5e-9 once multiplied by x
    vfloat p = splat(-0x1.ca2de2p-17f);
    p = fma(p, s, splat(0x1.d19cfap-13f));
    p = fma(p, s, splat(-0x1.36481cp-9f));
    p = fma(p, s, splat(0x1.46c382p-6f));
    p = fma(p, s, splat(-0x1.1057f0p-3f));
    p = fma(p, s, splat(0x1.988452p-1f));
    const vfloat near = fma(p, x, splat(1.0f));
    // log2(erfc(t / sqrt(2))) on [1.2, 8]: error 1.1e-8, weighted with the root of erfc. Beyond, erfc < 2e-15 counts as
    // 0.
    vfloat r = splat(0x1.e09d8cp-24f);
    r = fma(r, t, splat(-0x1.487f0cp-18f));
    r = fma(r, t, splat(0x1.944e38p-14f));
    r = fma(r, t, splat(-0x1.2bbb4ep-10f));
    r = fma(r, t, splat(0x1.2f9b22p-7f));
    r = fma(r, t, splat(-0x1.c702acp-5f));
    r = fma(r, t, splat(-0x1.d38dc2p-2f));
    r = fma(r, t, splat(-0x1.2701f4p+0f));
    r = fma(r, t, splat(0x1.16b1c0p-12f));
    const vfloat tail = where(t < kEnd, power_of_two(r));
    const vfloat far = choose(x < 0.0f, tail, 2.0f - tail);
    return choose(t < kSwitch, near, far);
}

FASTBERT_INLINE vfloat tangent(vfloat x) {
    const vfloat t = magnitude(x), s = x * x;
    // (tanh(x) / x - 1) / x^2 on [0, 0.625], error 4.1e-9 once multiplied by x^2
    vfloat p = splat(-0x1.76ac1ap-8f);
    p = fma(p, s, splat(0x1.5256d8p-6f));
    p = fma(p, s, splat(-0x1.b84448p-5f));
    p = fma(p, s, splat(0x1.110768p-3f));
    p = fma(p, s, splat(-0x1.555534p-2f));
    const vfloat near = fma(p * s, x, x);
    const vfloat far = 1.0f - 2.0f / (1.0f + power_of_two(t * (2.0f * kLog2E)));
    const vfloat signed_far = (vfloat)((vuint)far | ((vuint)x & 0x80000000u));
    return choose(t < 0.625f, near, signed_far);
}

template <int kActivation>
FASTBERT_INLINE vfloat activate(vfloat x) {
    switch (kActivation) {
        case kRelu:
            return where(~(x < 0.0f), x);
        case kGelu:
            return 0.5f * x * one_plus_erf(x);
        case kGeluTanh: {
            // x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
            constexpr float kTwiceScale = 1.59576912160573071f, kCubic = 0.044715f;
            return x * sigmoid(kTwiceScale * x * fma(kCubic * x, x, splat(1.0f)));
        }
        case kGeluQuick:
            return x * sigmoid(1.702f * x);
        case kSilu:
            return x * sigmoid(x);
        case kTanh:
            return tangent(x);
        default:
            return x;
    }
}

}  // namespace
}  // namespace fastbert

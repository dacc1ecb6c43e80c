// The cumulative distribution functions that gate an activation: the normal one that of GELU, the logistic one that of
// its approximations and of SiLU. Relative errors of a few ulps also in the left tail. For files that are compiled once
// for each instruction set, like simd.h.
#pragma once

#include "exponential.h"
#include "simd.h"

namespace {

FASTBERT_INLINE vfloat absolute(vfloat v) {
    return (vfloat)((vuint)v & 0x7fffffffu);
}

// 1 / v for v from 1 to 1e30.
FASTBERT_INLINE vfloat reciprocal(vfloat v) {
#if defined(__AVX512F__)
    const vfloat r = (vfloat)_mm512_rcp14_ps((__m512)v);
    return fma(fma(-v, r, splat(1.0f)), r, r);  // Newton's step doubles the 14 bits
#else
    return 1.0f / v;
#endif
}

// p is the probability below z, and q that above; each has the precision of its own magnitude.
struct Tails {
    vfloat p, q;
};

FASTBERT_INLINE Tails tails(vfloat z, vfloat below_minus_absolute) {
    const vfloat other = 1.0f - below_minus_absolute;
    const vint negative = z < 0.0f;
    return {negative ? below_minus_absolute : other, negative ? other : below_minus_absolute};
}

FASTBERT_INLINE Tails logistic(vfloat z) {
    const vfloat e = exponential(-absolute(z));
    const vfloat r = reciprocal(1.0f + e);
    const vint negative = z < 0.0f;
    return {negative ? e * r : r, negative ? r : e * r};
}

// exp(-z^2 / 2), the normal density but for a factor.
FASTBERT_INLINE vfloat bell(vfloat z) {
    return exp2(z * -0x1.715476p-1f * z);
}

// Phi(-t) = exp(-t^2 / 2) u P(u) with u = 1 / (1 + 0.305 t), for t >= 0 until it underflows. P has the least largest
// relative error, 1e-7; 0.305 is where that is least for its degree. The rounding of t^2 / 2 adds t^2 / 2 half ulps.
FASTBERT_INLINE vfloat lower_normal_tail(vfloat z, vfloat bell_of_z) {
    const vfloat t = minimum(splat(20.0f), absolute(z));  // the bell is 0 long before
    const vfloat u = reciprocal(fma(t, splat(0x1.3851ecp-2f), splat(1.0f)));
    vfloat p = fma(splat(0x1.2ca3dcp-5f), u, splat(-0x1.395204p-3f));
    p = fma(p, u, splat(0x1.7c5946p-3f));
    p = fma(p, u, splat(-0x1.371baep-5f));
    p = fma(p, u, splat(0x1.efb490p-4f));
    p = fma(p, u, splat(0x1.a79c9ap-4f));
    p = fma(p, u, splat(0x1.f59fc6p-4f));
    p = fma(p, u, splat(0x1.f23c82p-4f));
    return bell_of_z * (p * u);
}

}  // namespace

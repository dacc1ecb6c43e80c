// Powers of two and of e, vectorised. For files that are compiled once for each instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace {

// 2^x for x <= 1, -infinity among them: at most 2 ulps off where the result is normal, below that it may be 0; 1 at 0,
// so that one key is attended to with weight 1; NaN stays. 2^x = 2^floor(x) * 2^f with f in [0, 1]; of the polynomials
// that are 1 at 0 it has the least largest relative error, 8.3e-8 (Remez).
FASTBERT_INLINE vfloat exp2_fraction(vfloat f) {
    vfloat p = fma(splat(0x1.e974fap-10f), f, splat(0x1.277856p-7f));
    p = fma(p, f, splat(0x1.c91ce6p-5f));
    p = fma(p, f, splat(0x1.ebdb56p-3f));
    p = fma(p, f, splat(0x1.62e4bap-1f));
    return fma(p, f, splat(1.0f));
}

FASTBERT_INLINE vfloat exp2(vfloat x) {
#if defined(__AVX512F__)
    const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return (vfloat)_mm512_scalef_ps((__m512)exp2_fraction((vfloat)f), (__m512)x);
#else
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const vfloat magic = splat(12582912.0f);
    const vfloat bounded = maximum(splat(-126.0f), x);
    const vfloat shifted = (bounded - 0.5f) + magic;
    const vfloat p = exp2_fraction(bounded - (shifted - magic));
    const vuint result = (vuint)p + ((vuint)shifted << 23);
    return x != x ? x : where(x >= splat(-126.0f), (vfloat)result);  // the bits of a NaN are no exponent
#endif
}

// e^x for x <= 0, -infinity among them, and little above: at most 2 ulps off where the result is normal, below that it
// may be 0; 1 at 0, so that a sum of exponentials with a 0 among them is at least 1; NaN stays. e^x = 2^n * 2^f with f
// in [-1/2, 1/2]; of the polynomials that are 1 at 0 it has the least largest relative error, 1e-7.
FASTBERT_INLINE vfloat exponential(vfloat x) {
    const vfloat log2e = splat(0x1.715476p+0f);
    [[maybe_unused]] const vfloat log2e_rest = splat(0x1.4ae0c0p-26f);
#if defined(__AVX512F__)
    const vfloat bounded = maximum(splat(-104.0f), x);  // e^-104 is below the least denormal
    const vfloat n =
        (vfloat)_mm512_roundscale_ps((__m512)(bounded * log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const vfloat least = splat(-87.336f), magic = splat(12582912.0f);  // as in exp2()
    const vfloat bounded = maximum(least, x);
    const vfloat shifted = bounded * log2e + magic;
    const vfloat n = shifted - magic;
#endif
#if defined(__AVX2__)
    const vfloat f = fma(bounded, log2e_rest, fma(bounded, log2e, -n));
#else
    // Without a fused product: n * the upper part of ln(2) is exact (Cody and Waite).
    const vfloat f = ((bounded - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f) * log2e;
#endif
    vfloat p = fma(splat(0x1.5bba10p-10f), f, splat(0x1.3cea88p-7f));
    p = fma(p, f, splat(0x1.c6b752p-5f));
    p = fma(p, f, splat(0x1.ebf9bcp-3f));
    p = fma(p, f, splat(0x1.62e42ap-1f));
    p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
    return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const vuint result = (vuint)p + ((vuint)shifted << 23);
    return x != x ? x : where(x >= least, (vfloat)result);  // the bits of a NaN are no exponent
#endif
}

}  // namespace

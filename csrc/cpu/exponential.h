// Powers of two, vectorised. For files that are compiled once for each instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace {

// 2^x for x <= 1, -infinity among them: at most 2 ulps off where the result is normal, below that it may be 0; NaN
// stays. 2^x = 2^floor(x) * 2^f with f in [0, 1]; the polynomial has the least largest relative error, 7.5e-8 (Remez).
FASTBERT_INLINE vfloat exp2_fraction(vfloat f) {
    vfloat p = fma(splat(0x1.ec320ap-10f), f, splat(0x1.26900cp-7f));
    p = fma(p, f, splat(0x1.c95446p-5f));
    p = fma(p, f, splat(0x1.ebd5a8p-3f));
    p = fma(p, f, splat(0x1.62e4f6p-1f));
    return fma(p, f, splat(0x1.fffffep-1f));
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
    return where(~(x < splat(-126.0f)), (vfloat)result);
#endif
}

}  // namespace

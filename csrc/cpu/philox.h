// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), vectorised over
// counters. For files that are compiled once for each instruction set, like simd.h.
#pragma once

#include "simd.h"

namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxIncrement0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxIncrement1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

static_assert(kBlock == kLanes / 2 * 4, "one philox_words() covers a block of stream indices");

FASTBERT_INLINE vlong splat_long(uint64_t value) {
    return value - vlong{};
}

// 64-bit products of the low 32 bits of each lane.
FASTBERT_INLINE vlong multiply_low(vlong a, vlong b) {
#if defined(__AVX512F__)
    return (vlong)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vlong)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vlong)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Lanes a0 b0 a1 b1 … of 64 bits: the lower half of the result in `low`, the upper in `high`.
FASTBERT_INLINE void interleave(vlong a, vlong b, vlong* low, vlong* high) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    *low = (vlong)_mm512_permutex2var_epi64((__m512i)a, first, (__m512i)b);
    *high = (vlong)_mm512_permutex2var_epi64((__m512i)a, second, (__m512i)b);
#elif defined(__AVX2__)
    const __m256i even = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);  // a0 b0 a2 b2
    const __m256i odd = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);   // a1 b1 a3 b3
    *low = (vlong)_mm256_permute2x128_si256(even, odd, 0x20);
    *high = (vlong)_mm256_permute2x128_si256(even, odd, 0x31);
#else
    *low = vlong{a[0], b[0]};
    *high = vlong{a[1], b[1]};
#endif
}

// Words of kLanes / 2 counters. A lane holds one counter's word in its low half; the upper half is
// left as it falls, for multiply_low does not read it.
struct PhiloxWords {
    vlong c0, c1, c2, c3;
};

FASTBERT_INLINE PhiloxWords philox_of(uint64_t seed, vlong index) {
    vlong c0 = index, c1 = index >> 32, c2 = {}, c3 = {};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    const vlong m0 = splat_long(kPhiloxMultiplier0), m1 = splat_long(kPhiloxMultiplier1);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const vlong product0 = multiply_low(c0, m0), product1 = multiply_low(c2, m1);
        c0 = (product1 >> 32) ^ c1 ^ splat_long(k0);
        c1 = product1;
        c2 = (product0 >> 32) ^ c3 ^ splat_long(k1);
        c3 = product0;
        k0 += kPhiloxIncrement0;
        k1 += kPhiloxIncrement1;
    }
    return {c0, c1, c2, c3};
}

// Those of the counters from `counter` on.
FASTBERT_INLINE PhiloxWords philox_words(uint64_t seed, uint64_t counter) {
    vlong index;
    for (int i = 0; i < kLanes / 2; ++i) index[i] = (uint64_t)i;
    return philox_of(seed, index + splat_long(counter));
}

struct WordBlock {
    vuint first, second;
};

// The words of a block of stream indices, in their natural order.
FASTBERT_INLINE WordBlock natural_order(const PhiloxWords& w) {
    vlong first, second;
    interleave((w.c0 & 0xFFFFFFFFu) | (w.c1 << 32), (w.c2 & 0xFFFFFFFFu) | (w.c3 << 32), &first, &second);
    return {(vuint)first, (vuint)second};
}

// The even ones, then the odd ones: block order of bfloat16 (see simd.h).
FASTBERT_INLINE WordBlock even_odd_order(const PhiloxWords& w) {
    return {(vuint)((w.c0 & 0xFFFFFFFFu) | (w.c2 << 32)), (vuint)((w.c1 & 0xFFFFFFFFu) | (w.c3 << 32))};
}

}  // namespace

// One source for every vector width: types, loads, stores and the few operations that need an intrinsic.
//
// Included only by files that are compiled once for each instruction set. Everything here has internal linkage and is
// inlined by force: an ordinary inline function compiled for AVX-512 could be the one copy that the linker keeps for
// the baseline as well. For the same reason these files include no C++ standard library header. (immintrin.h is safe:
// it holds nothing but always-inline functions.)
//
// Floating-point contraction is off (-ffp-contract=off) and fma() explicit, so that two instances of one template
// round alike.
#pragma once

#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // _mm512_undefined_*() of GCC 12, GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define FASTBERT_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#define FASTBERT_INLINE_MEMBER inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint64_t vlong __attribute__((vector_size(kLanes * 4)));  // kLanes / 2 of them
typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));

// The same, at any address.
typedef float vfloat_at __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t vuint_at __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));  // pairs of bfloat16, too
typedef uint16_t vshort_at __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

FASTBERT_INLINE vfloat splat(float value) {
    return value - vfloat{};
}

FASTBERT_INLINE vuint splat(uint32_t value) {
    return value - vuint{};
}

FASTBERT_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// All ones in lanes below `count`.
FASTBERT_INLINE vint lanes_below(int count) {
    vint lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    return lane < count;
}

// a where the mask is set, 0 elsewhere (also where a is NaN).
FASTBERT_INLINE vfloat where(vint mask, vfloat a) {
    return (vfloat)((vint)a & mask);
}

// The larger of a and b, the smaller; b where either is NaN.
FASTBERT_INLINE vfloat maximum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

FASTBERT_INLINE vfloat minimum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vfloat)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}

FASTBERT_INLINE bool any(vint mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
    return _mm_movemask_epi8((__m128i)mask) != 0;
#else
    int found = 0;
    for (int i = 0; i < kLanes; ++i) found |= mask[i];
    return found != 0;
#endif
}

FASTBERT_INLINE float sum_of_lanes(vfloat v) {
#if defined(__AVX512F__)
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
    const __m256 halves = (__m256)v;
#endif
#if defined(__AVX2__)
    typedef float quad __attribute__((vector_size(16)));
    const quad q = (quad)_mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#else
    const vfloat q = v;
#endif
    return (q[0] + q[2]) + (q[1] + q[3]);
}

FASTBERT_INLINE float square_root(float value) {
    return __builtin_sqrtf(value);  // one instruction: errno is off
}

// Lanes a0 b0 a1 b1 …: the lower half of them in `low`, the upper in `high`.
FASTBERT_INLINE void interleave(vfloat a, vfloat b, vfloat* low, vfloat* high) {
#if defined(__AVX512F__)
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    *low = (vfloat)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
    *high = (vfloat)_mm512_permutex2var_ps((__m512)a, second, (__m512)b);
#elif defined(__AVX2__)
    const __m256 lower = _mm256_unpacklo_ps((__m256)a, (__m256)b);  // a0 b0 a1 b1 a4 b4 a5 b5
    const __m256 upper = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    *low = (vfloat)_mm256_permute2f128_ps(lower, upper, 0x20);
    *high = (vfloat)_mm256_permute2f128_ps(lower, upper, 0x31);
#else
    *low = vfloat{a[0], b[0], a[1], b[1]};
    *high = vfloat{a[2], b[2], a[3], b[3]};
#endif
}

// Rows become columns. Each interleaving of row i and row i + kLanes / 2 moves the highest bit of the row number to the
// end of the column number, and the other way round.
FASTBERT_INLINE void transpose(vfloat (&rows)[kLanes]) {
    for (int width = 1; width < kLanes; width *= 2) {
        vfloat next[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) interleave(rows[i], rows[i + kLanes / 2], &next[2 * i], &next[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

// ---- bfloat16 ----

FASTBERT_INLINE vfloat widen(vshort bits) {
    return (vfloat)(__builtin_convertvector(bits, vuint) << 16);
}

// The upper half of each lane is v rounded to bfloat16: to nearest, ties to even; a NaN stays a (quiet) NaN, denormals
// stay. The lower half is left over.
FASTBERT_INLINE vuint rounded_upper(vfloat v) {
    const vuint bits = (vuint)v;
    const vuint rounded = bits + (((bits >> 16) & 1) + 0x7fff);
    return v != v ? bits | 0x400000 : rounded;
}

FASTBERT_INLINE vshort narrow(vfloat v) {
    return __builtin_convertvector(rounded_upper(v) >> 16, vshort);
}

// ---- loads and stores ----

FASTBERT_INLINE vfloat load(const float* at) {
    return *(const vfloat_at*)at;
}

FASTBERT_INLINE vfloat load(const bfloat16* at) {
    return widen(*(const vshort_at*)at);
}

FASTBERT_INLINE void store(float* at, vfloat v) {
    *(vfloat_at*)at = v;
}

// Sweeps go over a row in blocks of two vectors. Of a float32 row these are the first and the second half of the block.
// Of a bfloat16 row they are its even and its odd elements, because these take one instruction each to widen, where
// neighbours take a shuffle. All float32 companions of a bfloat16 row (parameters, dropout factors, sums over rows) lie
// in memory in that order, "block order", so that they need no shuffle either. What is left of a row behind the last
// whole block is in its natural order.
constexpr int kBlock = 2 * kLanes;

struct block {
    vfloat first, second;
};

FASTBERT_INLINE block operator+(block a, block b) {
    return {a.first + b.first, a.second + b.second};
}

FASTBERT_INLINE block operator*(block a, block b) {
    return {a.first * b.first, a.second * b.second};
}

FASTBERT_INLINE block load_block(const float* at) {
    return {load(at), load(at + kLanes)};
}

FASTBERT_INLINE block load_block(const bfloat16* at) {
    const vuint pairs = *(const vuint_at*)at;  // even elements in the lower halves (little-endian)
    return {(vfloat)(pairs << 16), (vfloat)(pairs & 0xffff0000u)};
}

FASTBERT_INLINE void store_block(float* at, block v) {
    store(at, v.first);
    store(at + kLanes, v.second);
}

FASTBERT_INLINE void store_block(bfloat16* at, block v) {
    *(vuint_at*)at = (rounded_upper(v.first) >> 16) | (rounded_upper(v.second) & 0xffff0000u);
}

// Past the caches: for results that nobody reads soon. `at` is aligned to a block of T; stream_end() orders the stores
// before what the caller does next.
FASTBERT_INLINE void stream(void* at, vuint v) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)at, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i*)at, (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128((__m128i*)at, (__m128i)v);
#else
    *(vuint_at*)at = v;
#endif
}

FASTBERT_INLINE void stream_block(float* at, block v) {
    stream(at, (vuint)v.first);
    stream(at + kLanes, (vuint)v.second);
}

FASTBERT_INLINE void stream_block(bfloat16* at, block v) {
    stream(at, (rounded_upper(v.first) >> 16) | (rounded_upper(v.second) & 0xffff0000u));
}

FASTBERT_INLINE void stream_end() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The first `count` <= kLanes elements; the other lanes are 0. Memory behind them is not touched.
FASTBERT_INLINE vfloat load_part(const float* at, int count) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), at);
#elif defined(__AVX2__)
    return (vfloat)_mm256_maskload_ps(at, (__m256i)lanes_below(count));
#else
    vfloat v = {};
    for (int i = 0; i < count; ++i) v[i] = at[i];
    return v;
#endif
}

FASTBERT_INLINE vfloat load_part(const bfloat16* at, int count) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return widen((vshort)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), at));
#else
    vshort bits = {};
    for (int i = 0; i < count; ++i) bits[i] = at[i].bits;
    return widen(bits);
#endif
}

FASTBERT_INLINE void store_part(float* at, vfloat v, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(at, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(at, (__m256i)lanes_below(count), (__m256)v);
#else
    for (int i = 0; i < count; ++i) at[i] = v[i];
#endif
}

FASTBERT_INLINE void store_part(bfloat16* at, vfloat v, int count) {
    const vshort bits = narrow(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm256_mask_storeu_epi16(at, (__mmask16)((1u << count) - 1), (__m256i)bits);
#else
    for (int i = 0; i < count; ++i) at[i].bits = bits[i];
#endif
}

}  // namespace

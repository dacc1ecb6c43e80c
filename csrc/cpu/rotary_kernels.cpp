// Rotary kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "rotary.h"

#include "block_order.h"
#include "simd.h"

namespace fastbert {
namespace {

// Lanes 1 0 3 2 ...
FASTBERT_INLINE vfloat swap_neighbours(vfloat v) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_permute_ps((__m512)v, 0xB1);
#elif defined(__AVX2__)
    return (vfloat)_mm256_permute_ps((__m256)v, 0xB1);
#else
    return vfloat{v[1], v[0], v[3], v[2]};
#endif
}

// The other one of each pair of neighbours, for a block of a row of T.
template <class T>
FASTBERT_INLINE block partners(block v) {
    if (sizeof(T) == sizeof(float)) return {swap_neighbours(v.first), swap_neighbours(v.second)};
    return {v.second, v.first};
}

// What the features of a token are multiplied by, in the order of rows of T.
struct Angles {
    float* cos;
    float* sin;
};

FASTBERT_INLINE float table_element(const void* table, Dtype dtype, int64_t index) {
    if (dtype == kFloat32) return ((const float*)table)[index];
    return load_part((const bfloat16*)table + index, 1)[0];
}

// y = x * cos + partner * sin, neighbours being pairs: cos has each angle twice, sin with the sign of its feature.
template <class T>
FASTBERT_INLINE void turn_neighbours(const T* x, const Angles& angles, int64_t width, T* y) {
    int64_t column = 0;
    for (; column + kBlock <= width; column += kBlock) {
        const block v = load_block(x + column), other = partners<T>(v);
        const block c = load_block(angles.cos + column), s = load_block(angles.sin + column);
        store_block(y + column,
                    {fma(v.first, c.first, other.first * s.first), fma(v.second, c.second, other.second * s.second)});
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        const vfloat v = load_part(x + column, count);
        const vfloat c = load_part(angles.cos + column, count), s = load_part(angles.sin + column, count);
        store_part(y + column, fma(v, c, swap_neighbours(v) * s), count);
    }
}

// The pairs being (x[i], x[i + half]).
template <class T>
FASTBERT_INLINE void turn_halves(const T* x, const Angles& angles, int64_t half, T* y) {
    int64_t column = 0;
    for (; column + kBlock <= half; column += kBlock) {
        const block u = load_block(x + column), v = load_block(x + half + column);
        const block c = load_block(angles.cos + column), s = load_block(angles.sin + column);
        store_block(y + column,
                    {fma(u.first, c.first, -(v.first * s.first)), fma(u.second, c.second, -(v.second * s.second))});
        store_block(y + half + column,
                    {fma(u.first, s.first, v.first * c.first), fma(u.second, s.second, v.second * c.second)});
    }
    for (; column < half; column += kLanes) {
        const int count = part_count(column, half);
        const vfloat u = load_part(x + column, count), v = load_part(x + half + column, count);
        const vfloat c = load_part(angles.cos + column, count), s = load_part(angles.sin + column, count);
        store_part(y + column, fma(u, c, -(v * s)), count);
        store_part(y + half + column, fma(u, s, v * c), count);
    }
}

template <class T>
FASTBERT_INLINE void angles_of(const Rotary& a, int64_t position, const Angles& angles, const Angles& natural) {
    const float sign = a.inverse ? -1.0f : 1.0f;
    for (int64_t i = 0; i < a.pairs; ++i) {
        const float c = table_element(a.cos, a.table_dtype, position * a.cos_stride + i);
        const float s = table_element(a.sin, a.table_dtype, position * a.sin_stride + i) * sign;
        if (a.interleaved) {
            natural.cos[2 * i] = natural.cos[2 * i + 1] = c;
            natural.sin[2 * i] = -s;
            natural.sin[2 * i + 1] = s;
        } else {
            natural.cos[i] = c;
            natural.sin[i] = s;
        }
    }
    const int64_t width = a.interleaved ? 2 * a.pairs : a.pairs;
    to_block_order<T>(natural.cos, angles.cos, width);
    to_block_order<T>(natural.sin, angles.sin, width);
}

template <class T>
void forward(const Rotary& a, int64_t begin, int64_t end, float* scratch) {
    const int64_t turned = 2 * a.pairs, padded = padded_width(turned);
    const Angles angles = {scratch, scratch + padded}, natural = {scratch + 2 * padded, scratch + 3 * padded};
    for (int64_t token = begin; token < end; ++token) {
        const int64_t b = token / a.seq, s = token % a.seq;
        angles_of<T>(a, a.positions ? a.positions[token] : s, angles, natural);
        const T* const x = (const T*)a.x + b * a.batch_stride + s * a.seq_stride;
        for (int64_t head = 0; head < a.heads; ++head) {
            const T* const from = x + head * a.head_stride;
            T* const to = (T*)a.y + (token * a.heads + head) * a.head_dim;
            if (a.interleaved) {
                turn_neighbours(from, angles, turned, to);
            } else {
                turn_halves(from, angles, a.pairs, to);
            }
            for (int64_t i = turned; i < a.head_dim; ++i) to[i] = from[i];
        }
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const RotaryKernels rotary_kernels;
const RotaryKernels rotary_kernels = {
    {forward<float>, forward<bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

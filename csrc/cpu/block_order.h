// From natural order to block order (see simd.h). For files that are compiled once for each instruction set.
#pragma once

#include "simd.h"

namespace {

// A block of elements, in the order of a block of rows of T.
template <class T>
FASTBERT_INLINE block ordered_block(const float* at) {
    if (sizeof(T) == sizeof(float)) return load_block(at);
    block b;
    for (int i = 0; i < kLanes; ++i) {
        b.first[i] = at[2 * i];
        b.second[i] = at[2 * i + 1];
    }
    return b;
}

template <class T>
FASTBERT_INLINE block ordered_block(const bfloat16* at) {
    if (sizeof(T) == sizeof(bfloat16)) return load_block(at);
    return {load_part(at, kLanes), load_part(at + kLanes, kLanes)};
}

template <class T, class From>
FASTBERT_INLINE void to_block_order(const From* from, float* to, int64_t width) {
    int64_t column = 0;
    for (; column + kBlock <= width; column += kBlock) store_block(to + column, ordered_block<T>(from + column));
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        store_part(to + column, load_part(from + column, count), count);
    }
}

// Back: a block of rows of T, as floats in natural order.
template <class T>
FASTBERT_INLINE void store_natural(float* at, block b) {
    if (sizeof(T) == sizeof(float)) {
        store_block(at, b);
    } else {
        vfloat low, high;
        interleave(b.first, b.second, &low, &high);
        store_block(at, {low, high});
    }
}

}  // namespace

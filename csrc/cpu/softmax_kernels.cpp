// Softmax kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "softmax.h"

#include "block_order.h"
#include "exponential.h"
#include "simd.h"

namespace fastbert {
namespace {

constexpr float kInfinity = __builtin_inff();

// ---- masks ----

// A mask's row becomes terms in the order of rows of T (see simd.h): -infinity where nothing is kept.

template <class T>
FASTBERT_INLINE void keep_block(const uint8_t* keep, float* to) {
    typedef uint8_t bytes __attribute__((vector_size(kLanes)));
    typedef uint8_t bytes_at __attribute__((vector_size(kLanes), aligned(1), may_alias));
    vuint first, second;
    if (sizeof(T) == sizeof(float)) {
        first = __builtin_convertvector((bytes) * (const bytes_at*)keep, vuint);
        second = __builtin_convertvector((bytes) * (const bytes_at*)(keep + kLanes), vuint);
    } else {
        typedef uint16_t pairs_at __attribute__((vector_size(kLanes * 2), aligned(1), may_alias));
        const vuint pairs = __builtin_convertvector((vshort) * (const pairs_at*)keep, vuint);
        first = pairs & 0xffu;
        second = pairs >> 8;
    }
    const vfloat hidden = splat(-kInfinity);
    store_block(to, {where((vint)(first == 0), hidden), where((vint)(second == 0), hidden)});
}

template <class T>
FASTBERT_INLINE void keep_row(const uint8_t* keep, float* to, int64_t columns) {
    int64_t column = 0;
    for (; column + kBlock <= columns; column += kBlock) keep_block<T>(keep + column, to + column);
    for (; column < columns; ++column) to[column] = keep[column] ? 0.0f : -kInfinity;
}

// Goes through the rows of the mask beside those of the tensor. Many rows share one: it is converted once for all that
// follow one another.
template <class T>
struct MaskRows {
    const BroadcastMask& mask;
    float* terms;  // of the current row
    int64_t index[kMostMaskDims];
    int64_t offset, converted, converted_columns;

    FASTBERT_INLINE_MEMBER void start(int64_t row) {
        offset = 0;
        converted = -1;
        for (int d = mask.dims - 1; d >= 0; --d) {
            index[d] = row % mask.sizes[d];
            row /= mask.sizes[d];
            offset += index[d] * mask.strides[d];
        }
    }
    // The terms of the first `columns` columns, as those of a row of so many.
    FASTBERT_INLINE_MEMBER void convert(int64_t columns) {
        if (offset == converted && columns == converted_columns) return;
        converted = offset;
        converted_columns = columns;
        if (mask.type == kKeepMask) {
            keep_row<T>((const uint8_t*)mask.data + offset, terms, columns);
        } else if (mask.type == kFloat32Mask) {
            to_block_order<T>((const float*)mask.data + offset, terms, columns);
        } else {
            to_block_order<T>((const bfloat16*)mask.data + offset, terms, columns);
        }
    }
    FASTBERT_INLINE_MEMBER void next() {
        for (int d = mask.dims - 1; d >= 0; --d) {
            offset += mask.strides[d];
            if (++index[d] < mask.sizes[d]) return;
            offset -= mask.sizes[d] * mask.strides[d];
            index[d] = 0;
        }
    }
};

// ---- forward ----

enum MaskUse { kPlain, kAdd, kSelect };

template <MaskUse kUse>
FASTBERT_INLINE vfloat logit(vfloat x, vfloat scale, vfloat term) {
    if (kUse == kAdd) return fma(x, scale, term);
    const vfloat v = x * scale;
    if (kUse == kPlain) return v;
    return term == 0.0f ? v : splat(-kInfinity);  // whatever x is there
}

// Logits of a row into `logits`, in the order of T; returns the largest.
template <MaskUse kUse, class T>
FASTBERT_INLINE float logits_of(const T* x, float scale, const float* terms, float* logits, int64_t columns) {
    const vfloat s = splat(scale);
    vfloat largest[2] = {splat(-kInfinity), splat(-kInfinity)};
    int64_t column = 0;
    for (; column + kBlock <= columns; column += kBlock) {
        const block v = load_block(x + column);
        block t = {};
        if (kUse != kPlain) t = load_block(terms + column);
        const block l = {logit<kUse>(v.first, s, t.first), logit<kUse>(v.second, s, t.second)};
        store_block(logits + column, l);
        largest[0] = maximum(l.first, largest[0]);
        largest[1] = maximum(l.second, largest[1]);
    }
    for (; column < columns; column += kLanes) {
        const int count = part_count(column, columns);
        vfloat t = {};
        if (kUse != kPlain) t = load_part(terms + column, count);
        const vfloat l = logit<kUse>(load_part(x + column, count), s, t);
        store_part(logits + column, l, count);
        const vfloat inside = lanes_below(count) ? l : splat(-kInfinity);
        largest[0] = maximum(inside, largest[0]);
    }
    return largest_lane(maximum(largest[0], largest[1]));
}

// exp(logit - largest) in place; returns the sum.
FASTBERT_INLINE float exponentials_of(float* logits, float largest, int64_t columns) {
    const vfloat m = splat(largest);
    vfloat sum[4] = {};
    int64_t column = 0;
    for (; column + 2 * kBlock <= columns; column += 2 * kBlock) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const vfloat e = exponential(load(logits + column + i * kLanes) - m);
            store(logits + column + i * kLanes, e);
            sum[i] += e;
        }
    }
    for (; column < columns; column += kLanes) {
        const int count = part_count(column, columns);
        const vfloat e = where(lanes_below(count), exponential(load_part(logits + column, count) - m));
        store_part(logits + column, e, count);
        sum[0] += e;
    }
    return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
FASTBERT_INLINE void write_row(const float* from, float factor, T* y, int64_t columns, bool past_caches) {
    const vfloat f = splat(factor);
    int64_t column = 0;
    for (; column + kBlock <= columns; column += kBlock) {
        const block e = load_block(from + column), v = {e.first * f, e.second * f};
        if (past_caches) {
            stream_block(y + column, v);
        } else {
            store_block(y + column, v);
        }
    }
    for (; column < columns; column += kLanes) {
        const int count = part_count(column, columns);
        store_part(y + column, load_part(from + column, count) * f, count);
    }
}

template <class T>
FASTBERT_INLINE void fill_row(T* y, float value, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += kLanes) {
        store_part(y + column, splat(value), part_count(column, end));
    }
}

FASTBERT_INLINE bool has_nan(const float* row, int64_t columns) {
    bool found = false;
    for (int64_t column = 0; column < columns; ++column) found |= row[column] != row[column];
    return found;
}

template <MaskUse kUse, class T>
FASTBERT_INLINE void forward_rows(const Softmax& a, int64_t begin, int64_t end, float* scratch) {
    float* const terms = scratch + padded_width(a.columns);
    MaskRows<T> mask = {a.mask, terms, {}, 0, -1, 0};
    if (kUse != kPlain) mask.start(begin);
    for (int64_t row = begin; row < end; ++row) {
        int64_t kept = a.columns;  // the first ones of a row, worked on as if there were no others
        if (a.causal_rows && row % a.causal_rows + 1 < kept) kept = row % a.causal_rows + 1;
        if (kUse != kPlain) mask.convert(sizeof(T) == sizeof(float) ? a.columns : kept);
        T* const y = (T*)a.y + row * a.columns;
        const float largest = logits_of<kUse>((const T*)a.x + row * a.x_stride, a.scale, terms, scratch, kept);
        if (largest == -kInfinity) {
            fill_row(y, has_nan(scratch, kept) ? __builtin_nanf("") : 0.0f, 0, a.columns);
        } else {
            const float factor = 1.0f / exponentials_of(scratch, largest, kept);
            write_row(scratch, factor, y, kept, a.stream);
            fill_row(y, 0.0f * factor, kept, a.columns);  // 0, or NaN if there is any
        }
        if (kUse != kPlain) mask.next();
    }
    if (a.stream) stream_end();
}

template <class T>
void forward(const Softmax& a, int64_t begin, int64_t end, float* scratch) {
    if (a.mask.type == kUnmasked) {
        forward_rows<kPlain, T>(a, begin, end, scratch);
    } else if (a.mask.type == kKeepMask) {
        forward_rows<kSelect, T>(a, begin, end, scratch);
    } else {
        forward_rows<kAdd, T>(a, begin, end, scratch);
    }
}

// ---- backward ----

// dx = scale * y * (grad_y - sum(grad_y * y))
template <class T>
void backward(const SoftmaxBackward& a, int64_t begin, int64_t end) {
    const vfloat scale = splat(a.scale);
    for (int64_t row = begin; row < end; ++row) {
        const T* const grad = (const T*)a.grad_y + row * a.grad_y_stride;
        const T* const y = (const T*)a.y + row * a.y_stride;
        T* const dx = (T*)a.dx + row * a.columns;
        vfloat sum[4] = {};  // independent additions, to hide their latency
        int64_t column = 0;
        for (; column + 2 * kBlock <= a.columns; column += 2 * kBlock) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const block g = load_block(grad + column + i * kBlock), v = load_block(y + column + i * kBlock);
                sum[2 * i] = fma(g.first, v.first, sum[2 * i]);
                sum[2 * i + 1] = fma(g.second, v.second, sum[2 * i + 1]);
            }
        }
        for (; column + kBlock <= a.columns; column += kBlock) {
            const block g = load_block(grad + column), v = load_block(y + column);
            sum[0] = fma(g.first, v.first, sum[0]);
            sum[1] = fma(g.second, v.second, sum[1]);
        }
        for (; column < a.columns; column += kLanes) {
            const int count = part_count(column, a.columns);
            sum[0] = fma(load_part(grad + column, count), load_part(y + column, count), sum[0]);
        }
        const vfloat dot = splat(sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])));
        column = 0;
        for (; column + kBlock <= a.columns; column += kBlock) {
            const block g = load_block(grad + column), v = load_block(y + column);
            const block d = {scale * v.first * (g.first - dot), scale * v.second * (g.second - dot)};
            if (a.stream) {
                stream_block(dx + column, d);
            } else {
                store_block(dx + column, d);
            }
        }
        for (; column < a.columns; column += kLanes) {
            const int count = part_count(column, a.columns);
            const vfloat g = load_part(grad + column, count), v = load_part(y + column, count);
            store_part(dx + column, scale * v * (g - dot), count);
        }
    }
    if (a.stream) stream_end();
}

}  // namespace

namespace FASTBERT_ISA {

extern const SoftmaxKernels softmax_kernels;
const SoftmaxKernels softmax_kernels = {
    {forward<float>, forward<bfloat16>},
    {backward<float>, backward<bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

// Products with prepacked weights, of one instruction set. Compiled once for each, with FASTBERT_ISA naming it: see
// simd.h for what such a file may not do.
#include "linear.h"

#include "activations.h"
#include "simd.h"

namespace fastbert {
namespace {

// A tile of kTileRows rows by kVectors vectors of channels keeps its sums in registers, beside one vector of weights
// for each and one of x: 8 * 3 + 3 + 1 of AVX-512's 32 registers, 4 * 3 + 3 + 1 of the 16 that others have.
constexpr int kVectors = 3;
constexpr int kPanel = kVectors * kLanes;
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

#if defined(__AVX512VNNI__)
// Four unsigned x times four signed weights: activations are stored plus 128, whose share of the sum is then taken off.
constexpr int kIntegers = 4;
constexpr int kUnsignedOffset = 128;
#else
// Two by two of 16 bits. (The instruction for bytes that AVX2 has saturates.)
constexpr int kIntegers = 2;
constexpr int kUnsignedOffset = 0;
#endif
constexpr float kLargestInteger = 127.0f;

typedef vint vint_at __attribute__((aligned(4), may_alias));
typedef uint32_t unit_at __attribute__((aligned(2), may_alias));

FASTBERT_INLINE vuint splat_unit(uint32_t unit) {
    return unit - vuint{};
}

// ---- sum += the products of a unit of x with a vector of units of weights ----

template <int kPrecision>
struct Sum;

template <>
struct Sum<kPrecisionFloat32> {
    vfloat sum;
    FASTBERT_INLINE_MEMBER void add(vuint x, vuint w) { sum = fma((vfloat)x, (vfloat)w, sum); }
};

template <>
struct Sum<kPrecisionBfloat16> {
    vfloat sum;
    FASTBERT_INLINE_MEMBER void add(vuint x, vuint w) {
#if defined(__AVX512BF16__)
        sum = (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
        sum = fma((vfloat)(x << 16), (vfloat)(w << 16), sum);
        sum = fma((vfloat)(x & 0xffff0000u), (vfloat)(w & 0xffff0000u), sum);
#endif
    }
};

template <>
struct Sum<kPrecisionInt8> {
    vuint sum;  // modulo 2³²: what remains without the offset is exact
    FASTBERT_INLINE_MEMBER void add(vuint x, vuint w) {
#if defined(__AVX512VNNI__)
        sum = (vuint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif defined(__AVX512BW__)
        sum += (vuint)_mm512_madd_epi16((__m512i)x, (__m512i)w);
#elif defined(__AVX2__)
        sum += (vuint)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__)
        sum += (vuint)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
        const vint low = ((vint)(x << 16) >> 16) * ((vint)(w << 16) >> 16), high = ((vint)x >> 16) * ((vint)w >> 16);
        sum += (vuint)low + (vuint)high;
#endif
    }
};

// ---- what follows the product ----

FASTBERT_INLINE vfloat load_any(const void* at, Dtype dtype, int64_t index, int count) {
    if (dtype == kFloat32) {
        const float* from = (const float*)at + index;
        return count == kLanes ? load(from) : load_part(from, count);
    }
    const bfloat16* from = (const bfloat16*)at + index;
    return count == kLanes ? widen(*(const vshort_at*)from) : load_part(from, count);
}

FASTBERT_INLINE void store_any(void* at, Dtype dtype, int64_t index, vfloat v, int count) {
    if (dtype == kFloat32) {
        float* to = (float*)at + index;
        if (count == kLanes) {
            store(to, v);
        } else {
            store_part(to, v, count);
        }
        return;
    }
    bfloat16* to = (bfloat16*)at + index;
    if (count == kLanes) {
        *(vshort_at*)to = narrow(v);
    } else {
        store_part(to, v, count);
    }
}

template <Activation kActivation>
FASTBERT_INLINE vfloat activate(vfloat z) {
    switch (kActivation) {
        case kGelu:
            return ErfGelu::at(z).value;
        case kGeluTanh:
            return TanhGelu::at(z).value;
        case kGeluQuick:
            return QuickGelu::at(z).value;
        case kSilu:
            return Silu::at(z).value;
        case kRelu:
            return Relu::at(z).value;
        case kSigmoid:
            return Sigmoid::at(z).value;
        case kTanh:
            return hyperbolic_tangent(z);
        case kNone:
            return z;
    }
}

template <Activation kActivation>
FASTBERT_INLINE void finish_row(const LinearForward& a, const vfloat (&sums)[kVectors], int64_t row, int64_t channel) {
#pragma GCC unroll 3
    for (int j = 0; j < kVectors; ++j) {
        const int64_t first = channel + j * kLanes;
        const int count = (int)(a.weights.out - first < kLanes ? a.weights.out - first : kLanes);
        if (count <= 0) break;
        vfloat v = sums[j];
        if (a.bias) v += load_any(a.bias, a.bias_dtype, first, count);
        v = activate<kActivation>(v);
        if (a.residual) v += load_any(a.residual, a.residual_dtype, row * a.residual_stride + first, count);
        store_any(a.y, a.y_dtype, row * a.y_stride + first, v, count);
    }
}

// Out of line: it is a small part of the work, and twelve tiles would each hold eight activations.
__attribute__((noinline)) void finish(const LinearForward& a, const vfloat (*sums)[kVectors], int rows, int64_t row,
                                      int64_t channel) {
    switch (a.activation) {
#define FASTBERT_FINISH(name)                                                          \
    case name:                                                                         \
        for (int i = 0; i < rows; ++i) finish_row<name>(a, sums[i], row + i, channel); \
        break;
        FASTBERT_FINISH(kGelu)
        FASTBERT_FINISH(kGeluTanh)
        FASTBERT_FINISH(kGeluQuick)
        FASTBERT_FINISH(kSilu)
        FASTBERT_FINISH(kRelu)
        FASTBERT_FINISH(kSigmoid)
        FASTBERT_FINISH(kTanh)
        FASTBERT_FINISH(kNone)
#undef FASTBERT_FINISH
    }
}

FASTBERT_INLINE vfloat as_float(const LinearForward&, const Sum<kPrecisionFloat32>& s, int64_t, int64_t) {
    return s.sum;
}

FASTBERT_INLINE vfloat as_float(const LinearForward&, const Sum<kPrecisionBfloat16>& s, int64_t, int64_t) {
    return s.sum;
}

FASTBERT_INLINE vfloat as_float(const LinearForward& a, const Sum<kPrecisionInt8>& s, int64_t row, int64_t channel) {
    const vint offset = *(const vint_at*)(a.weights.offsets + channel);
    const vint exact = (vint)(s.sum - (vuint)offset);
    return __builtin_convertvector(exact, vfloat) * (load(a.weights.scales + channel) * splat(a.x_scales[row]));
}

// ---- a tile: kRows rows, one panel ----

// Of each row of a panel a tile fetches one cache line: as many tiles as a row has lines fetch all of the next panel.
constexpr int kLine = 64;
constexpr int kLinesOfRow = (kPanel * 4 + kLine - 1) / kLine;

struct Ahead {
    const char* at;
    int64_t step;  // bytes for each unit of depth; 0: nothing is left to fetch
};

template <int kPrecision, int kRows>
void tile(const LinearForward& a, const uint32_t* panel, Ahead ahead, int64_t row, int64_t channel) {
    const int64_t depth = a.weights.depth, stride = a.x_stride;
    const unit_at* x[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) x[i] = (const unit_at*)(a.x + (row + i) * stride);
    Sum<kPrecision> s[kRows][kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
        vuint w[kVectors];
        __builtin_prefetch(ahead.at + k * ahead.step, 0, 2);
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) w[j] = *(const vuint_at*)(panel + k * kPanel + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const vuint unit = splat_unit(x[i][k]);
#pragma GCC unroll 3
            for (int j = 0; j < kVectors; ++j) s[i][j].add(unit, w[j]);
        }
    }
    vfloat sums[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < kVectors; ++j) sums[i][j] = as_float(a, s[i][j], row + i, channel + j * kLanes);
    }
    finish(a, sums, kRows, row, channel);
}

template <int kPrecision>
void forward(const LinearForward& a, int64_t panel_index, int64_t begin, int64_t end, int64_t next_index) {
    const int64_t channel = panel_index * kPanel, depth = a.weights.depth;
    const uint32_t* const panel = a.weights.panels + channel * depth;
    const char* const next = (const char*)(a.weights.panels + next_index * kPanel * depth);
    Ahead ahead = {next, next_index == panel_index ? 0 : kLine};
    int64_t row = begin;
    for (; row + kTileRows <= end; row += kTileRows) {
        tile<kPrecision, kTileRows>(a, panel, ahead, row, channel);
        ahead.at += depth * ahead.step;
        if (ahead.at >= next + kLinesOfRow * depth * kLine) ahead = {next, 0};
    }
    switch (end - row) {
#if defined(__AVX512F__)
        case 7:
            return tile<kPrecision, 7>(a, panel, ahead, row, channel);
        case 6:
            return tile<kPrecision, 6>(a, panel, ahead, row, channel);
        case 5:
            return tile<kPrecision, 5>(a, panel, ahead, row, channel);
        case 4:
            return tile<kPrecision, 4>(a, panel, ahead, row, channel);
#endif
        case 3:
            return tile<kPrecision, 3>(a, panel, ahead, row, channel);
        case 2:
            return tile<kPrecision, 2>(a, panel, ahead, row, channel);
        case 1:
            return tile<kPrecision, 1>(a, panel, ahead, row, channel);
    }
}

// ---- packing ----

FASTBERT_INLINE float element(const void* row, Dtype dtype, int64_t i) {
    if (dtype == kFloat32) return ((const float*)row)[i];
    union {
        uint32_t bits;
        float value;
    } wide = {(uint32_t)((const bfloat16*)row)[i].bits << 16};
    return wide.value;
}

FASTBERT_INLINE uint32_t bits_of(float value) {
    union {
        float value;
        uint32_t bits;
    } both = {value};
    return both.bits;
}

// As rounded_upper() of simd.h, for one number.
FASTBERT_INLINE uint32_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return (bits | 0x400000) >> 16;
    return (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
}

// To nearest, ties to even; |value| <= 127.
FASTBERT_INLINE int32_t to_integer(float value) {
    return (int32_t)(bits_of(value + 12582912.0f) - 0x4b400000u);
}

FASTBERT_INLINE uint32_t integer_lane(int32_t value, int lane) {
    constexpr int kBits = 32 / kIntegers;
    return ((uint32_t)value & (0xffffffffu >> (32 - kBits))) << (kBits * lane);
}

// The scale of a row or channel with this largest magnitude, and its inverse. What is not finite makes the scale NaN,
// and with it all that the row or channel touches.
struct Scale {
    float scale, inverse;
};

FASTBERT_INLINE Scale scale_of(float largest) {
    if (!(largest < __builtin_inff())) return {__builtin_nanf(""), 0.0f};
    const float inverse = kLargestInteger / largest;
    if (!(inverse < __builtin_inff())) return {0.0f, 0.0f};  // all of it is 0, or below 4e-37
    return {largest / kLargestInteger, inverse};
}

template <int kPrecision>
void pack(const void* weight, Dtype dtype, int64_t stride, int64_t out, int64_t in, int64_t depth, uint32_t* panels,
          float* scales, int32_t* offsets, int64_t begin, int64_t end) {
    const int64_t last = (end + kPanel - 1) / kPanel * kPanel;
    const int64_t row_bytes = stride * (dtype == kFloat32 ? 4 : 2);
    for (int64_t channel = begin; channel < last; ++channel) {
        uint32_t* const to = panels + channel / kPanel * kPanel * depth + channel % kPanel;
        const bool real = channel < out;
        const char* const from = (const char*)weight + (real ? channel : 0) * row_bytes;
        if (!real) {
            for (int64_t k = 0; k < depth; ++k) to[k * kPanel] = 0;
            if (kPrecision == kPrecisionInt8) scales[channel] = 0.0f, offsets[channel] = 0;
            continue;
        }
        if (kPrecision == kPrecisionFloat32) {
            for (int64_t k = 0; k < in; ++k) to[k * kPanel] = bits_of(element(from, dtype, k));
            continue;
        }
        if (kPrecision == kPrecisionBfloat16) {
            for (int64_t k = 0; k < depth; ++k) {
                const uint32_t high = 2 * k + 1 < in ? to_bfloat16(element(from, dtype, 2 * k + 1)) : 0;
                to[k * kPanel] = to_bfloat16(element(from, dtype, 2 * k)) | high << 16;
            }
            continue;
        }
        float largest = 0.0f;
        for (int64_t k = 0; k < in; ++k) {
            const float size = __builtin_fabsf(element(from, dtype, k));
            if (!(size <= largest)) largest = size;  // NaN stays: nothing is larger
            if (size != size) break;
        }
        const Scale s = scale_of(largest);
        int32_t total = 0;
        for (int64_t k = 0; k < depth; ++k) {
            uint32_t unit = 0;
            for (int lane = 0; lane < kIntegers; ++lane) {
                const int64_t i = k * kIntegers + lane;
                const int32_t q = i < in && s.inverse > 0.0f ? to_integer(element(from, dtype, i) * s.inverse) : 0;
                total += q;
                unit |= integer_lane(q, lane);
            }
            to[k * kPanel] = unit;
        }
        scales[channel] = s.scale;
        offsets[channel] = total * kUnsignedOffset;
    }
}

// ---- rows of x as units ----

template <class T>
void to_bfloat16_units(const void* x, int64_t stride, int64_t in, int64_t depth, uint32_t* units, float*, int64_t begin,
                       int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* const from = (const T*)x + row * stride;
        bfloat16* const to = (bfloat16*)(units + row * depth);
        int64_t column = 0;
        for (; column + kBlock <= in; column += kBlock) {
            const block v = load_block(from + column);
            if (sizeof(T) == 4) {
                *(vshort_at*)(to + column) = narrow(v.first);
                *(vshort_at*)(to + column + kLanes) = narrow(v.second);
            } else {
                store_block(to + column, v);
            }
        }
        for (; column < in; column += kLanes) {
            const int count = (int)(in - column < kLanes ? in - column : kLanes);
            store_part(to + column, load_part(from + column, count), count);
        }
        for (column = in; column < 2 * depth; ++column) to[column].bits = 0;
    }
}

// As to_integer(), for a vector.
FASTBERT_INLINE vint round_to_integers(vfloat v) {
    return (vint)(v + 12582912.0f) - 0x4b400000;
}

template <class T>
void to_integer_units(const void* x, int64_t stride, int64_t in, int64_t depth, uint32_t* units, float* scales,
                      int64_t begin, int64_t end) {
#if defined(__AVX512VNNI__)
    typedef uint8_t stored;
#else
    typedef int16_t stored;
#endif
    typedef stored vstored_at __attribute__((vector_size(kLanes * sizeof(stored)), aligned(1), may_alias));
    for (int64_t row = begin; row < end; ++row) {
        const T* const from = (const T*)x + row * stride;
        vuint largest_bits = {};
        int64_t column = 0;
        // Magnitudes compare as integers do, and NaN is above them all.
        for (; column + kLanes <= in; column += kLanes) {
            const vuint bits = (vuint)load_part(from + column, kLanes) & 0x7fffffffu;
            largest_bits = bits > largest_bits ? bits : largest_bits;
        }
        if (column < in) {
            const vuint bits = (vuint)load_part(from + column, (int)(in - column)) & 0x7fffffffu;
            largest_bits = bits > largest_bits ? bits : largest_bits;
        }
        union {
            uint32_t bits;
            float value;
        } largest = {0};
        for (int i = 0; i < kLanes; ++i) {
            if (largest_bits[i] > largest.bits) largest.bits = largest_bits[i];
        }
        const Scale s = scale_of(largest.value);
        scales[row] = s.scale;
        stored* const to = (stored*)(units + row * depth);
        const vfloat inverse = splat(s.inverse);
        column = 0;
        if (s.inverse > 0.0f) {
            for (; column + kLanes <= in; column += kLanes) {
                const vint q = round_to_integers(load_part(from + column, kLanes) * inverse) + kUnsignedOffset;
                *(vstored_at*)(to + column) = __builtin_convertvector(q, vstored_at);
            }
            if (column < in) {
                const int count = (int)(in - column);
                const vint q = round_to_integers(load_part(from + column, count) * inverse) + kUnsignedOffset;
                for (int i = 0; i < count; ++i) to[column + i] = (stored)q[i];
                column = in;
            }
        }
        for (; column < depth * kIntegers; ++column) to[column] = (stored)kUnsignedOffset;
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    kPanel,
    kTileRows,
    {1, 2, kIntegers},
    {pack<kPrecisionFloat32>, pack<kPrecisionBfloat16>, pack<kPrecisionInt8>},
    {{nullptr, nullptr},
     {to_bfloat16_units<float>, to_bfloat16_units<bfloat16>},
     {to_integer_units<float>, to_integer_units<bfloat16>}},
    {forward<kPrecisionFloat32>, forward<kPrecisionBfloat16>, forward<kPrecisionInt8>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

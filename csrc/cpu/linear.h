// Linear layers on prepacked weights: arguments and kernels. No standard library header here: the kernel files are
// compiled once for each instruction set (see simd.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "layer_norm.h"

namespace fastbert {

// What a product multiplies: float32; bfloat16; or 8-bit integers, one scale for each token and each output channel. It
// accumulates in float32, float32, int32.
enum Precision : int { kPrecisionFloat32 = 0, kPrecisionBfloat16 = 1, kPrecisionInt8 = 2, kPrecisions = 3 };

// A product consumes its depth in units of 32 bits: a float, two bfloat16, four (with VNNI; else two) integers.
//
// Weights are packed in panels of kernels.panel output channels, [panels][depth][panel] units, so that a product reads
// them once and in order. Behind the panels of integers stand, for each channel (padded to whole panels), its float
// scale and the int32 that the unsigned activations' offset adds to its sum.
struct LinearWeights {
    int64_t out, in, depth;  // depth in units
    const uint32_t* panels;
    const float* scales;     // integers only
    const int32_t* offsets;  // integers only
};

struct LinearForward {
    LinearWeights weights;
    const uint32_t* x;      // [rows, depth] units
    int64_t x_stride;       // units
    const float* x_scales;  // [rows]; integers only
    const void* bias;       // [out], or null
    Dtype bias_dtype;
    Activation activation;
    const void* residual;  // added behind the activation; or null
    Dtype residual_dtype;
    int64_t residual_stride;
    void* y;
    Dtype y_dtype;
    int64_t y_stride;
};

struct LinearKernels {
    int panel;                       // channels
    int tile_rows;                   // rows that are worked on together
    int unit_elements[kPrecisions];  // elements of a row in a unit
    // Channels [begin, end) of `weight` [out, in], begin being a multiple of panel; where they end with `out`, the last
    // panel is filled up with zeros. For integers scales and offsets are written too.
    void (*pack[kPrecisions])(const void* weight, Dtype dtype, int64_t stride, int64_t out, int64_t in, int64_t depth,
                              uint32_t* panels, float* scales, int32_t* offsets, int64_t begin, int64_t end);
    // Rows [begin, end) of x as units [rows, depth], filled up with zeros; for integers their scales too. There is none
    // for float32.
    void (*convert[kPrecisions][kDtypes])(const void* x, int64_t stride, int64_t in, int64_t depth, uint32_t* units,
                                          float* scales, int64_t begin, int64_t end);
    // Rows [begin, end) of the panel's channels; meanwhile panel `next` is fetched into the second-level cache.
    void (*forward[kPrecisions])(const LinearForward&, int64_t panel, int64_t begin, int64_t end, int64_t next);
};

#ifndef FASTBERT_ISA
// Bytes of a packed weight for the current instruction set.
int64_t linear_packed_bytes(Precision precision, int64_t out, int64_t in);
// Packs weight [out, in] into `packed`, aligned to 64 bytes.
void linear_pack(Precision precision, const void* weight, Dtype dtype, int64_t stride, int64_t out, int64_t in,
                 void* packed, int threads);

// y = activation(x weight^T + bias) + residual, in the precision of the packed weight. A packed float32 weight takes
// float32 x.
struct Linear {
    Precision precision;
    int64_t rows, out, in;
    const void* x;
    Dtype x_dtype;
    int64_t x_stride;
    const void* packed;
    Parameter bias;
    Activation activation;
    const void* residual;
    Dtype residual_dtype;
    int64_t residual_stride;
    void* y;
    Dtype y_dtype;
    int64_t y_stride;
};
void linear(const Linear& a, int threads);
#endif

}  // namespace fastbert

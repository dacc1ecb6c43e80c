// GELU kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "gelu.h"

#include "activations.h"
#include "simd.h"

namespace fastbert {
namespace {

template <class T, class Activation>
void forward(const void* x_row, const float* bias, void* y_row, int64_t width) {
    const T* const x = (const T*)x_row;
    T* const y = (T*)y_row;
    int64_t column = 0;
    for (; column + kBlock <= width; column += kBlock) {
        block z = load_block(x + column);
        if (bias) z = z + load_block(bias + column);
        store_block(y + column, {Activation::at(z.first).value, Activation::at(z.second).value});
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        vfloat z = load_part(x + column, count);
        if (bias) z += load_part(bias + column, count);
        store_part(y + column, Activation::at(z).value, count);
    }
}

template <class T, class Activation>
void backward(const void* grad_row, const void* x_row, const float* bias, void* dx_row, float* dbias, int64_t width) {
    const T* const grad = (const T*)grad_row;
    const T* const x = (const T*)x_row;
    T* const dx = (T*)dx_row;
    int64_t column = 0;
    for (; column + kBlock <= width; column += kBlock) {
        block z = load_block(x + column);
        if (bias) z = z + load_block(bias + column);
        const block derivative = {Activation::at(z.first).derivative, Activation::at(z.second).derivative};
        const block dz = load_block(grad + column) * derivative;
        if (dx) store_block(dx + column, dz);
        if (dbias) store_block(dbias + column, load_block(dbias + column) + dz);
    }
    for (; column < width; column += kLanes) {
        const int count = part_count(column, width);
        vfloat z = load_part(x + column, count);
        if (bias) z += load_part(bias + column, count);
        const vfloat dz = load_part(grad + column, count) * Activation::at(z).derivative;
        if (dx) store_part(dx + column, dz, count);
        if (dbias) store_part(dbias + column, load_part(dbias + column, count) + dz, count);
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const GeluKernels gelu_kernels;
const GeluKernels gelu_kernels = {
    {{forward<float, ErfGelu>, forward<float, TanhGelu>, forward<float, QuickGelu>},
     {forward<bfloat16, ErfGelu>, forward<bfloat16, TanhGelu>, forward<bfloat16, QuickGelu>}},
    {{backward<float, ErfGelu>, backward<float, TanhGelu>, backward<float, QuickGelu>},
     {backward<bfloat16, ErfGelu>, backward<bfloat16, TanhGelu>, backward<bfloat16, QuickGelu>}},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

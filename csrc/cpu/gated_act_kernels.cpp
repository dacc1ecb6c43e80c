// Gated activations of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "gated_act.h"

#include "activations.h"
#include "simd.h"

namespace fastbert {
namespace {

template <class T, class Activation>
void forward(const GatedAct& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* const value = (const T*)a.value + row * a.value_stride;
        const T* const gate = (const T*)a.gate + row * a.gate_stride;
        T* const y = (T*)a.y + row * a.width;
        int64_t column = 0;
        for (; column + kBlock <= a.width; column += kBlock) {
            const block v = load_block(value + column), g = load_block(gate + column);
            store_block(y + column,
                        {v.first * Activation::at(g.first).value, v.second * Activation::at(g.second).value});
        }
        for (; column < a.width; column += kLanes) {
            const int count = part_count(column, a.width);
            const vfloat v = load_part(value + column, count), g = load_part(gate + column, count);
            store_part(y + column, v * Activation::at(g).value, count);
        }
    }
}

template <class T, class Activation>
void backward(const GatedAct& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* const grad = (const T*)a.grad_y + row * a.grad_y_stride;
        const T* const value = (const T*)a.value + row * a.value_stride;
        const T* const gate = (const T*)a.gate + row * a.gate_stride;
        T* const dvalue = a.dvalue ? (T*)a.dvalue + row * a.gradient_stride : nullptr;
        T* const dgate = a.dgate ? (T*)a.dgate + row * a.gradient_stride : nullptr;
        int64_t column = 0;
        for (; column + kBlock <= a.width; column += kBlock) {
            const block d = load_block(grad + column), v = load_block(value + column), g = load_block(gate + column);
            const Slope first = Activation::at(g.first), second = Activation::at(g.second);
            if (dvalue) store_block(dvalue + column, {d.first * first.value, d.second * second.value});
            if (dgate) {
                store_block(dgate + column,
                            {d.first * v.first * first.derivative, d.second * v.second * second.derivative});
            }
        }
        for (; column < a.width; column += kLanes) {
            const int count = part_count(column, a.width);
            const vfloat d = load_part(grad + column, count), v = load_part(value + column, count);
            const Slope s = Activation::at(load_part(gate + column, count));
            if (dvalue) store_part(dvalue + column, d * s.value, count);
            if (dgate) store_part(dgate + column, d * v * s.derivative, count);
        }
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const GatedActKernels gated_act_kernels;
const GatedActKernels gated_act_kernels = {
    {{forward<float, ErfGelu>, forward<float, TanhGelu>, forward<float, QuickGelu>, forward<float, Silu>,
      forward<float, Relu>, forward<float, Sigmoid>},
     {forward<bfloat16, ErfGelu>, forward<bfloat16, TanhGelu>, forward<bfloat16, QuickGelu>, forward<bfloat16, Silu>,
      forward<bfloat16, Relu>, forward<bfloat16, Sigmoid>}},
    {{backward<float, ErfGelu>, backward<float, TanhGelu>, backward<float, QuickGelu>, backward<float, Silu>,
      backward<float, Relu>, backward<float, Sigmoid>},
     {backward<bfloat16, ErfGelu>, backward<bfloat16, TanhGelu>, backward<bfloat16, QuickGelu>,
      backward<bfloat16, Silu>, backward<bfloat16, Relu>, backward<bfloat16, Sigmoid>}},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

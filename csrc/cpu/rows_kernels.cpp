// Vectors in block order and sums over rows, for one instruction set: see simd.h for what such a file may not do.
#include "rows.h"

#include "block_order.h"
#include "simd.h"

namespace fastbert {
namespace {

template <class T>
void parameter_to_block_order(const void* from, Dtype dtype, float* to, int64_t width) {
    if (dtype == kFloat32) {
        to_block_order<T>((const float*)from, to, width);
    } else {
        to_block_order<T>((const bfloat16*)from, to, width);
    }
}

// The columns [begin, end), where begin is the start of a block.
template <class T>
void from_block_order(const float* from, float* to, int64_t begin, int64_t end, int64_t width) {
    int64_t column = begin;
    for (; sizeof(T) != sizeof(float) && column + kBlock <= width && column < end; column += kBlock) {
        store_natural<T>(to + column, load_block(from + column));
    }
    for (; column < end; ++column) to[column] = from[column];
}

// Adds rows 1 … rows - 1 of `data` to row 0, in columns [begin, end).
void sum_rows(float* data, int64_t rows, int64_t stride, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += kLanes) {
        const int count = part_count(column, end);
        vfloat sum = load_part(data + column, count);
        if (count == kLanes) {
            for (int64_t row = 1; row < rows; ++row) sum += load(data + row * stride + column);
        } else {
            for (int64_t row = 1; row < rows; ++row) sum += load_part(data + row * stride + column, count);
        }
        store_part(data + column, sum, count);
    }
}

}  // namespace

namespace FASTBERT_ISA {

extern const RowKernels row_kernels;
const RowKernels row_kernels = {
    sum_rows,
    {parameter_to_block_order<float>, parameter_to_block_order<bfloat16>},
    {from_block_order<float>, from_block_order<bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

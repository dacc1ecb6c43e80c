// What operations on rows share: their parameters, their workspaces, and sums over rows that do not depend on the
// number of threads. No standard library header here: the kernel files include it (see simd.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "types.h"

namespace fastbert {

// Vectors in scratch memory are padded to whole blocks (see simd.h) of the widest instruction set.
constexpr int64_t kPadding = 32;

static inline int64_t padded_width(int64_t width) {
    return (width + kPadding - 1) / kPadding * kPadding;
}

// A vector of either dtype that belongs to rows: a weight, a bias.
struct Parameter {
    const void* data;  // [width]; null: absent
    Dtype dtype;
};

struct RowKernels {
    // Adds rows 1 … rows - 1 of `data` to row 0, in columns [begin, end).
    void (*sum_rows)(float* data, int64_t rows, int64_t stride, int64_t begin, int64_t end);
    // A vector of either dtype to float32 in block order of rows of a dtype; back, the columns [begin, end).
    void (*to_block_order[kDtypes])(const void* from, Dtype from_dtype, float* to, int64_t width);
    void (*from_block_order[kDtypes])(const float* from, float* to, int64_t begin, int64_t end, int64_t width);
};

#ifndef FASTBERT_ISA

// Uninitialised floats of one call. Every piece starts at a cache line, for a vector that crosses one costs twice.
class Workspace {
  public:
    explicit Workspace(int64_t floats);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    float* take(int64_t floats);  // a multiple of kPadding

  private:
    float* data_;
    float* next_;
};

// Kernels read parameters as float32 in block order: converted here where they are not, and filled in where they are
// absent. room_for() says how much of the workspace that takes.
const float* prepare(const Parameter& parameter, float absent, Dtype rows, int64_t width, Workspace& workspace);
int64_t room_for(const Parameter& parameter, Dtype rows, int64_t width);

// Rows below which another thread costs more than it saves.
int64_t grain_rows(int64_t width);

// Whether a result is larger than what the caches keep for its reader: then it is written past them. streams() also
// asks whether every one of its contiguous rows starts at a cache line.
bool is_large(int64_t bytes);
bool streams(const void* result, int64_t bytes, int64_t row_bytes);

// Sums over the rows, of some vectors [width]. A block of rows makes one partial sum; blocks depend on the number of
// rows alone, never on the threads: so the sums are the same bit for bit for any number of threads.
class RowSums {
  public:
    RowSums(Dtype dtype, int64_t rows, int64_t width);
    int64_t blocks() const { return blocks_; }
    int64_t block_begin(int64_t block) const { return block * block_rows_; }
    int64_t block_end(int64_t block) const;
    int ranges(int threads) const;  // for parallel_for over the blocks

    // Partial sums of `sums` vectors in block order: [blocks, sums, padded_width(width)]. clear() zeroes those of a
    // block.
    int64_t room(int sums) const;
    float* clear(float* partials, int sums, int64_t block) const;
    // Adds up the vector `index` into result [width].
    void finish(float* partials, int sums, int index, float* result, int threads) const;

  private:
    Dtype dtype_;
    int64_t rows_, width_, block_rows_, blocks_;
};

#endif

}  // namespace fastbert

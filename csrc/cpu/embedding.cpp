#include "embedding.h"

#include <string.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(EmbeddingKernels, embedding_kernels)

namespace {

// Columns that one thread sums at a time: a table with few entries has enough pieces for several threads.
constexpr int64_t kPieceColumns = 64;

// Tokens sorted by their entry, those of one entry in their order.
struct SortedTokens {
    std::vector<int64_t> tokens;
    std::vector<int64_t> starts;  // [entries + 1], into tokens

    SortedTokens(const int64_t* ids, int64_t count, const TableGradient& gradient)
        : tokens(static_cast<size_t>(count)), starts(static_cast<size_t>(gradient.entries) + 1) {
        for (int64_t i = 0; i < count; ++i) {
            if (ids[i] != gradient.padding) ++starts[ids[i] + 1];
        }
        for (int64_t entry = 0; entry < gradient.entries; ++entry) starts[entry + 1] += starts[entry];
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < count; ++i) {
            if (ids[i] != gradient.padding) tokens[next[ids[i]]++] = i;
        }
    }
};

void sum_by_entry(const EmbeddingBackward& a, const int64_t* ids, const TableGradient& gradient, int threads) {
    const SortedTokens sorted(ids, a.tokens, gradient);
    const int64_t width = a.width, stride = padded_width(width);
    // Most entries of a vocabulary are not there.
    std::vector<int64_t> entries;
    for (int64_t entry = 0; entry < gradient.entries; ++entry) {
        if (sorted.starts[entry] != sorted.starts[entry + 1]) entries.push_back(entry);
    }
    parallel_for(gradient.entries, range_count(gradient.entries, grain_rows(width), threads),
                 [&](int64_t begin, int64_t end, int) {
                     for (int64_t entry = begin; entry < end; ++entry) {
                         if (sorted.starts[entry] != sorted.starts[entry + 1]) continue;
                         memset(gradient.data + entry * width, 0, static_cast<size_t>(width) * sizeof(float));
                     }
                 });
    // Piece after piece of columns, and in each the entries with tokens. Ranges are of tokens, so that they are equally
    // long; an entry belongs to the range where its tokens start.
    const int64_t counted = sorted.starts[gradient.entries];
    const int64_t total = (width + kPieceColumns - 1) / kPieceColumns * counted;
    const auto sum = current_embedding_kernels().sum_selected;
    parallel_for(total, range_count(total, grain_rows(kPieceColumns), threads), [&](int64_t begin, int64_t end, int) {
        const auto starts_before = [&](int64_t entry, int64_t at) { return sorted.starts[entry] < at; };
        int64_t piece = begin / counted;
        auto next = std::lower_bound(entries.begin(), entries.end(), begin % counted, starts_before);
        for (;; ++next) {
            if (next == entries.end()) {
                next = entries.begin();
                ++piece;
            }
            const int64_t first = sorted.starts[*next], last = sorted.starts[*next + 1];
            if (piece * counted + first >= end) return;
            sum(a.d_total, stride, sorted.tokens.data() + first, last - first, piece * kPieceColumns,
                std::min((piece + 1) * kPieceColumns, width), gradient.data + *next * width);
        }
    });
}

}  // namespace

void embedding_layer_norm(Dtype dtype, EmbeddingForward a, Parameter weight, Parameter bias, int threads) {
    const int ranges = range_count(a.tokens, grain_rows(a.width), threads);
    const int64_t scratch_floats = 3 * padded_width(a.width);
    Workspace workspace(room_for(weight, dtype, a.width) + room_for(bias, dtype, a.width) + ranges * scratch_floats);
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    a.bias = prepare(bias, 0.0f, dtype, a.width, workspace);
    float* const scratch = workspace.take(ranges * scratch_floats);
    const auto forward = current_embedding_kernels().forward[dtype];
    parallel_for(a.tokens, ranges, [&](int64_t begin, int64_t end, int range) {
        forward(a, begin, end, scratch + range * scratch_floats);
    });
}

void embedding_layer_norm_backward(Dtype dtype, EmbeddingBackward a, const TableGradient (&gradients)[kTables],
                                   Parameter weight, int threads) {
    const RowSums row_sums(dtype, a.tokens, a.width);
    const int ranges = row_sums.ranges(threads);
    const int64_t stride = padded_width(a.width);
    float* const dweight = a.dweight;
    float* const dbias = a.dbias;
    const int sums = dweight || dbias ? 2 : 0;
    const bool tables = gradients[0].data || gradients[1].data || gradients[2].data;
    const int64_t scratch_floats = 3 * stride, d_total_floats = tables ? a.tokens * stride : 0;
    Workspace workspace(room_for(weight, dtype, a.width) + ranges * scratch_floats + row_sums.room(sums) +
                        d_total_floats);
    a.weight = prepare(weight, 1.0f, dtype, a.width, workspace);
    float* const scratch = workspace.take(ranges * scratch_floats);
    float* const partials = workspace.take(row_sums.room(sums));
    a.d_total = tables ? workspace.take(d_total_floats) : nullptr;

    const auto backward = current_embedding_kernels().backward[dtype];
    parallel_for(row_sums.blocks(), ranges, [&](int64_t begin, int64_t end, int range) {
        for (int64_t block = begin; block < end; ++block) {
            EmbeddingBackward part = a;
            float* const partial = row_sums.clear(partials, sums, block);
            part.dweight = sums ? partial : nullptr;
            part.dbias = sums ? partial + stride : nullptr;
            backward(part, row_sums.block_begin(block), row_sums.block_end(block), scratch + range * scratch_floats);
        }
    });
    if (dweight) row_sums.finish(partials, sums, 0, dweight, threads);
    if (dbias) row_sums.finish(partials, sums, 1, dbias, threads);
    for (int i = 0; i < kTables; ++i) {
        if (gradients[i].data) sum_by_entry(a, a.tables[i].ids, gradients[i], threads);
    }
}

}  // namespace fastbert

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(AttentionKernels, attention_kernels)

namespace {

constexpr int64_t kShares = 4;  // a chunk is a thread's part of what is left, divided by this

struct Position {
    int64_t sequence, head, query;
};

// Calls visit(position, cost) for every tile, in the order in which they are worked on.
template <class Visit>
void for_tiles(const Attention& a, int64_t tile, const Visit& visit) {
    for (int64_t b = 0; b < a.batch; ++b) {
        const Sequence s = sequence_of(a, b);
        for (int64_t head = 0; head < a.heads; ++head) {
            for (int64_t query = 0; query < s.seq_q; query += tile) {
                visit(Position{b, head, query}, tile_cost(a, s, query, tile));
            }
        }
    }
}

}  // namespace

void attention(Dtype dtype, Attention a, int threads) {
    const AttentionKernels& kernels = current_attention_kernels();
    const int64_t tile = kernels.tile_queries;
    int64_t total = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
        const Sequence s = sequence_of(a, b);
        a.longest_k = std::max(a.longest_k, s.seq_k);
        int64_t head = 0;
        for (int64_t query = 0; query < s.seq_q; query += tile) head += tile_cost(a, s, query, tile);
        total += a.heads * head;
    }
    if (total == 0) return;
    static const float nothing = 0.0f;  // no keys have no address to count from
    if (!a.k.data) a.k = {&nothing, 0, 0, 0, 1};
    if (!a.v.data) a.v = {&nothing, 0, 0, 0, 1};

    // Chunks of consecutive tiles, which the threads take one after another. The later, the smaller: long runs spare
    // packing, and at the end no thread is idle for long.
    std::vector<Position> starts;
    int64_t left = total, chunk_left = 0;
    for_tiles(a, tile, [&](const Position& position, int64_t cost) {
        if (chunk_left <= 0) {
            starts.push_back(position);
            chunk_left = std::max(kLeastAttentionChunk, left / (kShares * std::max(threads, 1)));
        }
        chunk_left -= cost;
        left -= cost;
    });
    const int64_t chunks = static_cast<int64_t>(starts.size());
    starts.push_back({a.batch, 0, 0});

    const int ranges = range_count(chunks, 1, threads);
    constexpr int64_t kLine = 64;
    const int64_t bytes = kernels.workspace[dtype](a) + kLine;  // a line between the threads' parts
    std::unique_ptr<char[]> memory(new char[static_cast<size_t>(ranges * bytes + kLine)]);
    char* const first = memory.get() + (kLine - reinterpret_cast<uintptr_t>(memory.get()) % kLine);
    const auto forward = kernels.forward[dtype];
    std::atomic<int64_t> next{0};
    parallel_for(ranges, ranges, [&](int64_t begin, int64_t, int) {
        char* const workspace = first + begin * bytes;
        Panels panels = {-1, -1};
        for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
            const Position end = starts[chunk + 1];
            for (Position at = starts[chunk];
                 at.sequence < end.sequence || at.head < end.head || at.query < end.query;) {
                const Sequence s = sequence_of(a, at.sequence);
                const bool last = at.sequence == end.sequence && at.head == end.head;
                const int64_t queries = last ? end.query : s.seq_q;
                if (at.query < queries) forward(a, s, at.head, at.query, queries, workspace, panels);
                at = last                    ? end
                     : at.head + 1 < a.heads ? Position{at.sequence, at.head + 1, 0}
                                             : Position{at.sequence + 1, 0, 0};
            }
        }
    });
}

}  // namespace fastbert

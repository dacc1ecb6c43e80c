#include "attention_backward.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace fastbert {

FASTBERT_DISPATCH(AttentionBackwardKernels, attention_backward_kernels)

namespace {

// What one thread does without another: the sums of a task have one order, whatever the number of threads.
struct Task {
    int64_t cost;
    int64_t first_sequence, sequences, first_head, heads;  // heads of keys
};

std::vector<Task> tasks_of(const AttentionBackward& b, int64_t tile) {
    const Attention& a = b.forward;
    // What is summed over sequences or heads belongs to one task.
    const int64_t sequences = b.dmask && b.dmask_batch == 0 ? std::max<int64_t>(a.batch, 1) : 1;
    const int64_t heads = b.dmask && b.dmask_head == 0 ? std::max<int64_t>(a.kv_heads, 1) : 1;
    std::vector<Task> tasks;
    for (int64_t first = 0; first < a.batch; first += sequences) {
        int64_t cost = 0;  // of one head of queries
        for (int64_t i = first; i < first + sequences; ++i) {
            const Sequence s = sequence_of(a, i);
            for (int64_t query = 0; query < s.seq_q; query += tile) cost += tile_cost(a, s, query, tile);
        }
        for (int64_t head = 0; head < a.kv_heads; head += heads) {
            tasks.push_back({cost * (a.heads / a.kv_heads) * heads, first, sequences, head, heads});
        }
    }
    // The longest first, so that at the end no thread is idle for long.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.cost > y.cost; });
    return tasks;
}

}  // namespace

void attention_backward(Dtype dtype, AttentionBackward b, int threads) {
    const AttentionBackwardKernels& kernels = current_attention_backward_kernels();
    Attention& a = b.forward;
    for (int64_t i = 0; i < a.batch; ++i) a.longest_k = std::max(a.longest_k, sequence_of(a, i).seq_k);
    static const float nothing = 0.0f;  // no keys have no address to count from
    if (!a.k.data) a.k = {&nothing, 0, 0, 0, 1};
    if (!a.v.data) a.v = {&nothing, 0, 0, 0, 1};
    const std::vector<Task> tasks = tasks_of(b, kernels.tile_queries);
    int64_t total = 0;
    for (const Task& task : tasks) total += task.cost;

    const int64_t count = static_cast<int64_t>(tasks.size());
    const int ranges =
        std::min(range_count(count, 1, threads), std::max(1, range_count(total, kLeastAttentionChunk, threads)));
    static thread_local Scratch scratch;
    const int64_t bytes = Scratch::round_up(kernels.workspace[dtype](a)) + Scratch::kLine;  // a line between threads
    char* const memory = scratch.get(ranges * bytes);
    const auto backward = kernels.backward[dtype];
    std::atomic<int64_t> next{0};
    parallel_for(ranges, ranges, [&](int64_t begin, int64_t, int) {
        char* const workspace = memory + begin * bytes;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            const Task& task = tasks[i];
            for (int64_t sequence = 0; sequence < task.sequences; ++sequence) {
                const Sequence s = sequence_of(a, task.first_sequence + sequence);
                for (int64_t head = 0; head < task.heads; ++head) backward(b, s, task.first_head + head, workspace);
            }
        }
    });
    scratch.done();
}

}  // namespace fastbert

#include "gated_act.h"

#include <algorithm>

#include "dispatch.h"
#include "parallel.h"

namespace fastbert {

FASTBERT_DISPATCH(GatedActKernels, gated_act_kernels)

namespace {

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrainElements = 8192;

template <class Kernel>
void run(Kernel kernel, const GatedAct& a, int threads) {
    const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, a.width));
    parallel_for(a.rows, range_count(a.rows, grain, threads),
                 [&](int64_t begin, int64_t end, int) { kernel(a, begin, end); });
}

}  // namespace

void gated_act(Dtype dtype, Activation activation, const GatedAct& a, int threads) {
    run(current_gated_act_kernels().forward[dtype][activation], a, threads);
}

void gated_act_backward(Dtype dtype, Activation activation, const GatedAct& a, int threads) {
    run(current_gated_act_kernels().backward[dtype][activation], a, threads);
}

}  // namespace fastbert

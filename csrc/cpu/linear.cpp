#include "linear.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "parallel.h"
#include "scratch.h"

namespace fastbert {

FASTBERT_DISPATCH(LinearKernels, linear_kernels)

namespace {

// Rows of x that every panel of weights passes over before the next: 256 rows of 768 floats are 768 KiB, so that they
// stay in the second-level cache or near it, and the weights come by once for every 256 rows.
constexpr int64_t kRowBlock = 256;

// Tasks for each thread, so that none waits long for the last one.
constexpr int64_t kTasksPerThread = 4;

// Multiplications below which another thread costs more than it saves.
constexpr int64_t kGrain = 1 << 17;
constexpr int64_t kConvertGrain = 1 << 15;

int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

LinearWeights weights_of(const LinearKernels& kernels, Precision precision, int64_t out, int64_t in,
                         const void* packed) {
    LinearWeights w = {};
    const int64_t elements = kernels.unit_elements[precision];
    const int64_t padded = round_up(out, kernels.panel);
    w.out = out;
    w.in = in;
    w.depth = (in + elements - 1) / elements;
    w.panels = static_cast<const uint32_t*>(packed);
    if (precision == kPrecisionInt8) {
        w.scales = reinterpret_cast<const float*>(w.panels + padded * w.depth);
        w.offsets = reinterpret_cast<const int32_t*>(w.scales + padded);
    }
    return w;
}

}  // namespace

int64_t linear_packed_bytes(Precision precision, int64_t out, int64_t in) {
    const LinearKernels& kernels = current_linear_kernels();
    const LinearWeights w = weights_of(kernels, precision, out, in, nullptr);
    const int64_t padded = round_up(out, kernels.panel);
    return padded * w.depth * 4 + (precision == kPrecisionInt8 ? padded * 8 : 0);
}

void linear_pack(Precision precision, const void* weight, Dtype dtype, int64_t stride, int64_t out, int64_t in,
                 void* packed, int threads) {
    const LinearKernels& kernels = current_linear_kernels();
    const LinearWeights w = weights_of(kernels, precision, out, in, packed);
    const int64_t panels = (out + kernels.panel - 1) / kernels.panel;
    const int64_t grain = std::max<int64_t>(1, kConvertGrain / std::max<int64_t>(1, kernels.panel * in));
    parallel_for(panels, range_count(panels, grain, threads), [&](int64_t begin, int64_t end, int) {
        kernels.pack[precision](weight, dtype, stride, out, in, w.depth, const_cast<uint32_t*>(w.panels),
                                const_cast<float*>(w.scales), const_cast<int32_t*>(w.offsets), begin * kernels.panel,
                                std::min(end * kernels.panel, out));
    });
}

void linear(const Linear& a, int threads) {
    if (a.rows == 0 || a.out == 0) return;
    const LinearKernels& kernels = current_linear_kernels();
    LinearForward f = {};
    f.weights = weights_of(kernels, a.precision, a.out, a.in, a.packed);
    f.bias = a.bias.data;
    f.bias_dtype = a.bias.dtype;
    f.activation = a.activation;
    f.residual = a.residual;
    f.residual_dtype = a.residual_dtype;
    f.residual_stride = a.residual_stride;
    f.y = a.y;
    f.y_dtype = a.y_dtype;
    f.y_stride = a.y_stride;

    thread_local Scratch scratch;
    const int64_t depth = f.weights.depth;
    const bool ready =
        (a.precision == kPrecisionFloat32 && a.x_dtype == kFloat32) ||
        (a.precision == kPrecisionBfloat16 && a.x_dtype == kBfloat16 && a.in % 2 == 0 && a.x_stride % 2 == 0);
    if (ready) {
        f.x = static_cast<const uint32_t*>(a.x);
        f.x_stride = a.x_stride / kernels.unit_elements[a.precision];
    } else {
        const int64_t unit_bytes = Scratch::round_up(a.rows * depth * 4);
        char* const memory = scratch.get(unit_bytes + a.rows * 4);
        uint32_t* const units = reinterpret_cast<uint32_t*>(memory);
        float* const scales = reinterpret_cast<float*>(memory + unit_bytes);
        const auto convert = kernels.convert[a.precision][a.x_dtype];
        const int64_t grain = std::max<int64_t>(1, kConvertGrain / std::max<int64_t>(1, a.in));
        parallel_for(a.rows, range_count(a.rows, grain, threads), [&](int64_t begin, int64_t end, int) {
            convert(a.x, a.x_stride, a.in, depth, units, scales, begin, end);
        });
        f.x = units;
        f.x_stride = depth;
        f.x_scales = scales;
    }

    const auto forward = kernels.forward[a.precision];
    const int64_t panels = (a.out + kernels.panel - 1) / kernels.panel;
    // The last block of rows may be up to half as large again: no small one is left over.
    const int64_t blocks = std::max<int64_t>(1, a.rows / kRowBlock);
    const int64_t work = a.rows * a.out * depth;
    const int ranges = range_count(work, kGrain, threads);
    const int64_t tiles = (a.rows + kernels.tile_rows - 1) / kernels.tile_rows;
    // Few panels for many threads: each is cut across its rows.
    int64_t cuts = blocks;
    if (ranges > 1 && panels * blocks < kTasksPerThread * ranges) {
        cuts = std::min(tiles, (kTasksPerThread * ranges + panels - 1) / panels);
        cuts = std::max(cuts, blocks);
    }
    const int64_t tasks = cuts * panels;
    std::atomic<int64_t> next{0};
    parallel_for(ranges, ranges, [&](int64_t, int64_t, int) {
        for (;;) {
            const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= tasks) return;
            const int64_t following = task + ranges;  // this thread's next one where all are equally fast
            const int64_t cut = task / panels, panel = task % panels;
            const int64_t begin = tiles * cut / cuts * kernels.tile_rows;
            const int64_t end = std::min(tiles * (cut + 1) / cuts * kernels.tile_rows, a.rows);
            if (begin < end) forward(f, panel, begin, end, following < tasks ? following % panels : panel);
        }
    });
    scratch.done();
}

}  // namespace fastbert

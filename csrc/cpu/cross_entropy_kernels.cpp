// Cross-entropy kernels of one instruction set. Compiled once for each: see simd.h for what such a file may not do.
#include "cross_entropy.h"

#include "exponential.h"
#include "simd.h"

namespace fastbert {
namespace {

constexpr float kInfinity = __builtin_inff();

// A row goes through the first-level cache in chunks: each is read for its maximum, then again for its exponentials.
constexpr int64_t kChunk = 2048;

FASTBERT_INLINE float element(const float* at) {
    return *at;
}

FASTBERT_INLINE float element(const bfloat16* at) {
    return load_part(at, 1)[0];
}

template <class T>
FASTBERT_INLINE float largest_of(const T* x, int64_t count) {
    vfloat largest[2] = {splat(-kInfinity), splat(-kInfinity)};
    int64_t column = 0;
    for (; column + kBlock <= count; column += kBlock) {
        const block v = load_block(x + column);
        largest[0] = maximum(v.first, largest[0]);  // which is kept where v is NaN
        largest[1] = maximum(v.second, largest[1]);
    }
    for (; column < count; column += kLanes) {
        const int part = part_count(column, count);
        const vfloat v = load_part(x + column, part);
        largest[0] = maximum(lanes_below(part) ? v : splat(-kInfinity), largest[0]);
    }
    return largest_lane(maximum(largest[0], largest[1]));
}

// Differences are added up as this part of themselves, so that those of a chunk cannot overflow: among logits of the
// least number, which masks hold, each is near the largest.
constexpr float kPart = 0x1p-12f;

struct Sums {
    float exponentials, differences;  // of exp(x - shift) and of (x - shift) * kPart
};

template <bool kDifferences, class T>
FASTBERT_INLINE Sums sums_of(const T* x, int64_t count, float shift) {
    const vfloat s = splat(shift);
    vfloat e[2] = {}, d[2] = {};
    int64_t column = 0;
    for (; column + kBlock <= count; column += kBlock) {
        const block v = load_block(x + column);
        const vfloat first = v.first - s, second = v.second - s;
        e[0] += exponential(first);
        e[1] += exponential(second);
        if (kDifferences) {
            d[0] = fma(first, splat(kPart), d[0]);
            d[1] = fma(second, splat(kPart), d[1]);
        }
    }
    for (; column < count; column += kLanes) {
        const int part = part_count(column, count);
        const vfloat v = load_part(x + column, part) - s;
        e[0] += where(lanes_below(part), exponential(v));
        if (kDifferences) d[0] += where(lanes_below(part), v * kPart);
    }
    return {sum_of_lanes(e[0] + e[1]), kDifferences ? sum_of_lanes(d[0] + d[1]) : 0.0f};
}

template <class T>
FASTBERT_INLINE bool has_nan(const T* x, int64_t count) {
    bool found = false;
    for (int64_t column = 0; column < count; ++column) found |= element(x + column) != element(x + column);
    return found;
}

// log(sum(exp(x))) = shift + log(sum), and mean(x) = shift + mean_difference.
struct RowSums {
    double shift, sum, mean_difference;
};

template <bool kDifferences, class T>
FASTBERT_INLINE RowSums row_sums(const T* x, int64_t classes) {
    float shift = -kInfinity;
    double sum = 0.0, differences = 0.0;
    for (int64_t begin = 0; begin < classes; begin += kChunk) {
        const int64_t count = classes - begin < kChunk ? classes - begin : kChunk;
        const float largest = largest_of(x + begin, count);
        if (largest == kInfinity) {
            const float result = has_nan(x, classes) ? __builtin_nanf("") : kInfinity;
            return {0.0, result, result};
        }
        if (largest > shift) {
            if (shift != -kInfinity) {
                sum *= __builtin_exp((double)shift - largest);
                differences += (double)begin * ((double)shift - largest);
            }
            shift = largest;
        }
        // Nothing but -infinity so far: exp(-infinity - 0) is 0.
        const Sums sums = sums_of<kDifferences>(x + begin, count, shift == -kInfinity ? 0.0f : shift);
        sum += sums.exponentials;
        differences += sums.differences / (double)kPart;
    }
    return {shift == -kInfinity ? 0.0 : shift, sum, differences / (double)classes};
}

template <class T>
void forward(const CrossEntropy& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        if (a.target[row] == a.ignore_index) {
            a.losses[row] = 0.0f;
            a.lse[row] = 0.0f;
            continue;
        }
        const T* const x = (const T*)a.logits + row * a.logits_stride;
        const RowSums r = a.label_smoothing > 0.0f ? row_sums<true>(x, a.classes) : row_sums<false>(x, a.classes);
        const double log_sum = __builtin_log(r.sum);
        a.lse[row] = (float)(r.shift + log_sum);
        // Differences from the shift: large logits lie close together without harm.
        const double smoothing = a.label_smoothing, picked = element(x + a.target[row]);
        double loss = log_sum - (1.0 - smoothing) * (picked - r.shift);
        if (smoothing > 0.0) loss -= smoothing * r.mean_difference;
        a.losses[row] = (float)loss;
    }
}

// ---- backward ----

struct Gradient {
    vfloat lse, each, factor;  // (exp(x - lse) - each) * factor

    FASTBERT_INLINE_MEMBER vfloat of(vfloat x) const { return (exponential(x - lse) - each) * factor; }
};

template <class T>
FASTBERT_INLINE void gradient_row(const T* x, const Gradient& g, T* d, int64_t classes, bool past_caches) {
    int64_t column = 0;
    while (past_caches && (uintptr_t)(d + column) % 64 != 0 && column < classes) {  // up to a cache line's start
        const int64_t missing = (int64_t)(64 - (uintptr_t)(d + column) % 64) / (int64_t)sizeof(T);
        const int count = part_count(column, missing + column < classes ? missing + column : classes);
        store_part(d + column, g.of(load_part(x + column, count)), count);
        column += count;
    }
    for (; column + kBlock <= classes; column += kBlock) {
        const block v = load_block(x + column), result = {g.of(v.first), g.of(v.second)};
        if (past_caches) {
            stream_block(d + column, result);
        } else {
            store_block(d + column, result);
        }
    }
    for (; column < classes; column += kLanes) {
        const int count = part_count(column, classes);
        store_part(d + column, g.of(load_part(x + column, count)), count);
    }
}

template <class T>
FASTBERT_INLINE void zero_row(T* d, int64_t classes) {
    for (int64_t column = 0; column < classes; column += kLanes) {
        store_part(d + column, vfloat{}, part_count(column, classes));
    }
}

template <class T>
void backward(const CrossEntropyBackward& a, int64_t begin, int64_t end) {
    const float each = a.label_smoothing / (float)a.classes;
    for (int64_t row = begin; row < end; ++row) {
        const T* const x = (const T*)a.logits + row * a.logits_stride;
        T* const d = (T*)a.dlogits + row * a.classes;
        const int64_t target = a.target[row];
        if (target == a.ignore_index) {
            zero_row(d, a.classes);
            continue;
        }
        const float grad = a.grad_losses[row * a.grad_losses_stride];
        const Gradient other = {splat(a.lse[row]), splat(each), splat(grad)};
        const Gradient picked = {other.lse, splat(each + (1.0f - a.label_smoothing)), other.factor};
        const vfloat of_target = picked.of(load_part(x + target, 1));  // before x is overwritten
        gradient_row(x, other, d, a.classes, a.stream);
        store_part(d + target, of_target, 1);
    }
    if (a.stream) stream_end();
}

}  // namespace

namespace FASTBERT_ISA {

extern const CrossEntropyKernels cross_entropy_kernels;
const CrossEntropyKernels cross_entropy_kernels = {
    {forward<float>, forward<bfloat16>},
    {backward<float>, backward<bfloat16>},
};

}  // namespace FASTBERT_ISA
}  // namespace fastbert

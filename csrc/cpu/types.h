// What the operations share in their arguments. No standard library header here: the kernel files include it (see
// simd.h).
#pragma once

#include <stdint.h>

namespace fastbert {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kDtypes = 2 };

static inline int64_t dtype_bytes(Dtype dtype) {
    return dtype == kFloat32 ? 4 : 2;
}

// Numbers of fastbert/cpu/_launch.py's ACTIVATION_NUMBERS.
enum Activation : int {
    kGelu = 0,
    kGeluTanh = 1,
    kGeluQuick = 2,
    kSilu = 3,
    kRelu = 4,
    kSigmoid = 5,
    kTanh = 6,
    kNone = 7
};

struct Dropout {
    bool on;
    uint32_t threshold;  // an element is kept where its word is not below
    float scale;         // what a kept element is multiplied by
    uint64_t seed;
    uint64_t offset;  // stream index of the first element, a multiple of 4
};

}  // namespace fastbert

// What the operations share in their arguments. No standard library header here: the kernel files include it (see
// simd.h).
#pragma once

#include <stdint.h>

namespace fastbert {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kDtypes = 2 };

struct Dropout {
    bool on;
    uint32_t threshold;  // an element is kept where its word is not below
    float scale;         // what a kept element is multiplied by
    uint64_t seed;
    uint64_t offset;  // stream index of the first element, a multiple of 4
};

}  // namespace fastbert

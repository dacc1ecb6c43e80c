// The instruction set that answers, chosen once when the extension is imported.
#pragma once

#include <string>
#include <vector>

// Sets that this build contains besides the baseline. setup.py compiles each *_kernels.cpp once for each of them, into
// the namespace fastbert::<name>.
#if defined(__x86_64__)
#define FASTBERT_X86 1
#else
#define FASTBERT_X86 0
#endif

namespace fastbert {

enum class Isa { avx512_bf16, avx512, avx2, baseline };

Isa current_isa();

// Names of the sets that this machine (processor and operating system) can run, best first.
std::vector<std::string> supported_isas();
std::string isa_name();
// Throws std::invalid_argument, naming the supported sets, for any other name.
void set_isa(const std::string& name);

}  // namespace fastbert

// Declares one table of function pointers for every set, and <table>(), which returns the current one. Use in namespace
// fastbert, in the header of an operation.
#if FASTBERT_X86
#define FASTBERT_DISPATCH(Type, table)            \
    namespace avx512_bf16 {                       \
    extern const Type table;                      \
    }                                             \
    namespace avx512 {                            \
    extern const Type table;                      \
    }                                             \
    namespace avx2 {                              \
    extern const Type table;                      \
    }                                             \
    namespace baseline {                          \
    extern const Type table;                      \
    }                                             \
    static inline const Type& current_##table() { \
        switch (current_isa()) {                  \
            case Isa::avx512_bf16:                \
                return avx512_bf16::table;        \
            case Isa::avx512:                     \
                return avx512::table;             \
            case Isa::avx2:                       \
                return avx2::table;               \
            default:                              \
                return baseline::table;           \
        }                                         \
    }
#else
#define FASTBERT_DISPATCH(Type, table)            \
    namespace baseline {                          \
    extern const Type table;                      \
    }                                             \
    static inline const Type& current_##table() { \
        return baseline::table;                   \
    }
#endif

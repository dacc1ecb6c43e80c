#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace fastbert {
namespace {

struct IsaEntry {
    Isa isa;
    const char* name;
    bool (*supported)();
};

#if FASTBERT_X86
bool supports_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// __builtin_cpu_supports asks CPUID and also XGETBV: whether the operating system saves the registers.
const IsaEntry kIsas[] = {
// in order of preference
#if FASTBERT_X86
    {Isa::avx512_bf16, "avx512_bf16",
     [] { return supports_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"); }},
    {Isa::avx512, "avx512", supports_avx512},
    {Isa::avx2, "avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {Isa::baseline, "baseline", [] { return true; }},
};

const IsaEntry* best_entry() {
#if FASTBERT_X86
    __builtin_cpu_init();
#endif
    for (const IsaEntry& entry : kIsas) {
        if (entry.supported()) return &entry;
    }
    return nullptr;  // never: the baseline always runs
}

std::atomic<const IsaEntry*> current{best_entry()};

}  // namespace

Isa current_isa() {
    return current.load(std::memory_order_relaxed)->isa;
}

std::string isa_name() {
    return current.load(std::memory_order_relaxed)->name;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const IsaEntry& entry : kIsas) {
        if (entry.supported()) names.push_back(entry.name);
    }
    return names;
}

void set_isa(const std::string& name) {
    for (const IsaEntry& entry : kIsas) {
        if (name == entry.name && entry.supported()) {
            current.store(&entry, std::memory_order_relaxed);
            return;
        }
    }
    std::string message = "instruction set \"" + name + "\" is not one of those this machine supports:";
    for (const std::string& supported : supported_isas()) message += " " + supported;
    throw std::invalid_argument(message);
}

}  // namespace fastbert

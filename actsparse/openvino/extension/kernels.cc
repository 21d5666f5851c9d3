#include "kernels.hpp"

#include <cstdlib>
#include <cstring>

namespace actsparse {

std::vector<const Kernels*> available_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#if defined(ACTSPARSE_AMX)
        if (is_amx_available()) found.push_back(&amx_kernels);
#endif
        found.push_back(&avx512_kernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        found.push_back(&avx2_kernels);
#endif
    found.push_back(&portable_kernels);
    return found;
}

const Kernels& selected_kernels() {
    static const Kernels* const selected = [] {
        const auto found = available_kernels();
        const char* name = std::getenv("ACTSPARSE_ISA");
        for (const Kernels* kernels : found)
            if (name && !std::strcmp(kernels->name, name)) return kernels;
        return found.front();
    }();
    return *selected;
}

}  // namespace actsparse

#include "kernels.hpp"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace actsparse {
namespace {

#if defined(__x86_64__)
// What __builtin_cpu_supports has known since GCC 11 and Clang 18 only.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#elif defined(ACTSPARSE_NEON)
// Whether the processor has dot products, and matrix products, of INT8.
#if defined(__linux__)
// HWCAP_ASIMDDP and HWCAP2_I8MM, which not all headers know.
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif
#endif

}  // namespace

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
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        found.push_back(&avx2_kernels);
#endif
#if defined(ACTSPARSE_NEON)
    if (has_dotprod()) {
        if (has_i8mm()) found.push_back(&i8mm_kernels);
        found.push_back(&neon_kernels);
    }
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

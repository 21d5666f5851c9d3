// Run all tests, with the argument `hurry` fewer cases of them; or with `list`, name the kernels that run here, the selected
// ones first.
#include <chrono>
#include <cstdio>

#include "check.hpp"
#include "kernels.hpp"

int main(int count, char** arguments) {
    const std::string argument = count > 1 ? arguments[1] : "";
    is_hurried = argument == "hurry";
    if (argument == "list") {
        std::printf("%s\n", actsparse::selected_kernels().name);
        for (const actsparse::Kernels* kernels : actsparse::available_kernels()) std::printf("%s\n", kernels->name);
        return 0;
    }
    const struct {
        const char* name;
        void (*run)();
    } tests[] = {{"float16", test_float16}, {"elementwise", test_elementwise}, {"lists", test_lists},
                 {"packing", test_packing}, {"sites", test_sites},             {"rows", test_rows},
                 {"special values", test_special_values}, {"two callers", test_two_callers}, {"reading", test_reading}};
    for (const auto& test : tests) {
        const auto start = std::chrono::steady_clock::now();
        test.run();
        std::printf("%s: %.1f s\n", test.name, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        std::fflush(stdout);
    }
    return 0;
}

// One site: mask the input, and multiply what is left with the weights of all layers that read it.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "threads.hpp"
#include "weights.hpp"

namespace actsparse {

struct Site {
    Weights weights;
    const float* threshold;  // [in]: |x| <= threshold becomes 0
    bool is_exact;           // activations as the sum of kExactTerms int8 terms, not one (no difference for f16 and bf16 weights)
    const float* bias = nullptr;  // [out], or none
};

// Columns [begin, end) of a site's outputs, as an array [tokens][end - begin].
struct Output {
    float* data;
    size_t begin;
    size_t end;
};

// outputs = mask(x)[tokens][in] @ weights[in][out] + bias. What it keeps between calls is per thread.
void multiply_site(const Site& site, const float* x, size_t tokens, const std::vector<Output>& outputs,
                   const Kernels& kernels, const Threads& threads);

}  // namespace actsparse

// From kernels for one segment to the two functions of a kernel table.
#pragma once

#include <algorithm>

#include "kept_rows.hpp"
#include "weights.hpp"

namespace actsparse {

// acc[output - begin] += the products of passes [first, last), which lie in one segment, of one token, for outputs
// [begin, end) of a panel.
using MultiplyPart = void (*)(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                              size_t token, size_t segment, size_t first, size_t last, float* acc);

template <MultiplyPart multiply_part>
void multiply_by_segments(const Weights& weights, size_t panel, const KeptRows& kept, size_t token, size_t pass_begin,
                          size_t pass_end, float* acc) {
    for (size_t s = 0; s < kept.segments.size(); ++s) {
        const size_t first = std::max<size_t>(pass_begin, kept.segments[s].pass_begin);
        const size_t last = std::min<size_t>(pass_end, kept.segments[s].pass_end);
        if (first < last) multiply_part(weights, panel, 0, weights.width(panel), kept, token, s, first, last, acc);
    }
}

// A segment of a panel's weights stays in the first- or second-level cache while all tokens use it.
template <MultiplyPart multiply_part>
void multiply_tokens_by_segments(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                                 size_t token_begin, size_t token_end, float* acc) {
    for (size_t s = 0; s < kept.segments.size(); ++s)
        for (size_t token = token_begin; token < token_end; ++token)
            multiply_part(weights, panel, begin, end, kept, token, s, kept.segments[s].pass_begin,
                          kept.segments[s].pass_end, acc + (token - token_begin) * (end - begin));
}

}  // namespace actsparse

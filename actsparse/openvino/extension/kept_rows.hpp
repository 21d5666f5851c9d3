// The input channels that a site keeps for the tokens at hand, and their values, ready for a kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "weights.hpp"

namespace actsparse {

// Passes [pass_begin, pass_end) of the list share one activation scale and one group of weights.
struct Segment {
    uint32_t pass_begin;
    uint32_t pass_end;
    uint32_t group;
};

// A list of kept channels for `tokens` tokens. Each segment is padded to whole passes with value 0. The padding, and
// kPrefetchPasses beyond the end, repeats a kept channel, so that kernels read and fetch valid rows. The vectors only
// ever grow: their sizes say nothing.
// A tile of bf16 activations.
constexpr size_t kHalfTokens = 16;
constexpr size_t kHalfRows = 32;

struct KeptRows {
    size_t tokens = 0;
    size_t passes = 0;
    std::vector<uint32_t> row;        // [passes + kPrefetchPasses][kPassRows]
    std::vector<Segment> segments;
    // One row of each for every token:
    std::vector<float> value;         // [tokens][passes * kPassRows]
    std::vector<int8_t> quantized;    // [tokens][passes * kPassRows]
    std::vector<float> scale;         // [tokens][segments]: value ~ scale * quantized
    std::vector<int32_t> pass_sum;    // [tokens][passes]: sum of quantized
    std::vector<int32_t> segment_sum; // [tokens][segments]: the same
    std::vector<float> sum;           // [tokens]: sum of scale * quantized, or of half
    // In the place of what is quantized, where half_steps is not 0: bf16 in tiles [block of tokens][step][kHalfTokens]
    // [kHalfRows], with zeros beyond the list. A block holds half_tokens tokens.
    size_t half_steps = 0;
    size_t half_tokens = 0;
    std::vector<uint16_t> half;

    size_t half_place(size_t token) const {
        return (token / half_tokens * half_steps * kHalfTokens + token % half_tokens) * kHalfRows;
    }
    size_t length() const { return passes * kPassRows; }
};

}  // namespace actsparse

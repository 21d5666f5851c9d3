// The input channels that a site keeps for the tokens at hand, and their values, ready for a kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "weights.hpp"

namespace actsparse {

// Passes [pass_begin, pass_end) of the list share one activation scale and one group of weights. `step` is the first of
// its tiles, where there are any.
struct Segment {
    uint32_t pass_begin;
    uint32_t pass_end;
    uint32_t group;
    uint32_t step = 0;

    size_t rows() const { return (pass_end - pass_begin) * kPassRows; }
};

// Places [begin, end).
struct Range {
    size_t begin, end;
};

// A tile of activations: so many tokens, so many input channels.
constexpr size_t kTileTokens = 16;
constexpr size_t kTileRows = 64;
constexpr size_t kTileBytes = kTileTokens * kTileRows;
// Kept channels that share one activation scale where several tokens share a reading of the weights.
constexpr size_t kSharedSegmentRows = 2 * kTileRows;

// A list of kept channels for `tokens` tokens. Each segment is padded to whole passes with value 0. The padding, and
// kPrefetchPasses beyond the end, repeats a kept channel, so that kernels read and fetch valid rows. The vectors only
// ever grow: their sizes say nothing.
struct KeptRows {
    size_t tokens = 0;
    size_t passes = 0;
    std::vector<uint32_t> row;        // [passes + kPrefetchPasses][kPassRows]
    std::vector<Segment> segments;
    std::vector<Range> padding;       // of the list; exact mode: of a segment's first term only
    // One row of each for every token:
    std::vector<float> value;         // [tokens][passes * kPassRows]
    std::vector<int8_t> quantized;    // [tokens][passes * kPassRows]
    std::vector<float> scale;         // [tokens][segments]: value ~ scale * quantized
    std::vector<int32_t> pass_sum;    // [tokens][passes]: sum of quantized
    std::vector<int32_t> segment_sum; // [tokens][segments]: the same
    std::vector<float> sum;           // [tokens]: sum of scale * quantized
    // The same as `quantized`, where tile_steps is not 0: tiles [block of tile_tokens tokens][tile_steps]
    // [kTileTokens][kTileRows]. A segment fills whole tiles, with zeros beyond its end.
    size_t tile_steps = 0;
    size_t tile_tokens = 0;
    std::vector<int8_t> tiles;

    // Where a token's row of the first step lies.
    size_t tile_place(size_t token) const {
        return token / tile_tokens * tile_steps * kTileBytes + token % tile_tokens * kTileRows;
    }
    size_t length() const { return passes * kPassRows; }
};

}  // namespace actsparse

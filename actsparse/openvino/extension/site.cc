#include "site.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.hpp"
#include "scratch.hpp"

namespace actsparse {
namespace {

// More tokens than this keep every channel anyway: looking for those that none of them needs does not pay.
constexpr size_t kMaxUnionTokens = 8;
constexpr size_t kBlockTokens = 240;            // tokens that share one reading of the weights; a multiple of 6 and 16
constexpr size_t kBlockSums = 64 * 1024;        // floats of sums a thread works on: they stay in its second-level cache
constexpr size_t kTileOutputs = 128;            // a line of u4 weights
constexpr size_t kTilesPerThread = 4;
constexpr size_t kManyTokens = 16;
static_assert(kBlockTokens % kTileTokens == 0);

bool is_integer(const Weights& weights) { return weights.type == WeightType::u8 || weights.type == WeightType::u4; }

// Passes of one panel that one thread takes.
struct Part {
    size_t panel;
    size_t pass_begin;
    size_t pass_end;
};

// Scratch memory of the thread that calls multiply_site.
struct Scratch {
    KeptRows kept;
    std::vector<float> is_kept, nothing;  // [in]: 1 where a token keeps a channel; 0
    std::vector<Part> parts;
    std::vector<size_t> starts;
    std::vector<float> sums;  // [parts][outputs of a panel]
};

Scratch& scratch() {
    static thread_local Scratch s;
    return s;
}

// Cut the channels that a group of weights keeps, row[0, count) and for a single token their values, into segments.
// Return how far the list has grown.
size_t append_segments(KeptRows& kept, size_t length, size_t count, size_t group, size_t segment_rows, bool is_exact) {
    uint32_t* row = kept.row.data() + length;
    float* value = kept.value.data() + length;
    const size_t padded = (count + kPassRows - 1) / kPassRows * kPassRows;
    for (size_t i = count; i < padded; ++i) {
        row[i] = row[count - 1];
        value[i] = 0.0f;
    }
    const size_t repeats = is_exact ? kExactTerms : 1, segments = (padded + segment_rows - 1) / segment_rows;
    // Exact mode has every segment several times: each takes what rounding leaves of the one before. Move them apart,
    // last first.
    for (size_t i = segments; is_exact && i-- > 0;) {
        const size_t first = i * segment_rows, n = std::min(segment_rows, padded - first);
        std::memmove(row + repeats * first, row + first, n * sizeof *row);
        for (size_t repeat = 1; repeat < repeats; ++repeat)
            std::memcpy(row + repeats * first + repeat * n, row + repeats * first, n * sizeof *row);
        std::memmove(value + repeats * first, value + first, n * sizeof *value);
    }
    if (padded > count) {
        const size_t first = (segments - 1) * segment_rows, begin = length + repeats * first;
        kept.padding.push_back({begin + count - first, begin + padded - first});
    }
    for (size_t i = 0; i < segments; ++i) {
        const size_t first = i * segment_rows, n = std::min(segment_rows, padded - first);
        for (size_t repeat = 0; repeat < repeats; ++repeat) {
            const size_t begin = (length + repeats * first + repeat * n) / kPassRows;
            kept.segments.push_back({static_cast<uint32_t>(begin), static_cast<uint32_t>(begin + n / kPassRows),
                                     static_cast<uint32_t>(group)});
        }
    }
    return length + repeats * padded;
}

// Quantise a token's values segment by segment. In exact mode the next terms take what one segment leaves.
void quantize_token(KeptRows& kept, size_t token, bool is_exact, const Kernels& kernels) {
    float* value = kept.value.data() + token * kept.length();
    int8_t* quantized = kept.quantized.data() + token * kept.length();
    int32_t* pass_sum = kept.pass_sum.data() + token * kept.passes;
    float* scale = kept.scale.data() + token * kept.segments.size();
    float total = 0;
    for (size_t s = 0; s < kept.segments.size(); ++s) {
        const Segment& segment = kept.segments[s];
        const size_t first = segment.pass_begin * kPassRows;
        const size_t n = (segment.pass_end - segment.pass_begin) * kPassRows;
        float* rest = is_exact && (s + 1) % kExactTerms != 0 ? value + first + n : nullptr;
        kernels.quantize(value + first, n, quantized + first, scale + s, pass_sum + segment.pass_begin, rest);
        int32_t sum = 0;
        for (size_t pass = segment.pass_begin; pass < segment.pass_end; ++pass) sum += pass_sum[pass];
        kept.segment_sum[token * kept.segments.size() + s] = sum;
        total += scale[s] * static_cast<float>(sum);
    }
    kept.sum[token] = total;
}

// Make room for tiles of activations. Blocks of tokens are of about the same size, and begin where those that share one
// reading of the weights do.
void lay_out_tiles(KeptRows& kept) {
    const size_t few = std::min(kept.tokens, kBlockTokens), blocks = (few + kTileTokens - 1) / kTileTokens;
    kept.tile_tokens = (few + blocks - 1) / blocks;
    for (Segment& segment : kept.segments) {
        segment.step = static_cast<uint32_t>(kept.tile_steps);
        kept.tile_steps += (segment.rows() + kTileRows - 1) / kTileRows;
    }
    grow(kept.tiles, (kept.tokens + kept.tile_tokens - 1) / kept.tile_tokens * kept.tile_steps * kTileBytes);
}

// Copy what a token's values were quantised to, segment by segment, to tiles.
void tile_token(KeptRows& kept, size_t token) {
    const int8_t* quantized = kept.quantized.data() + token * kept.length();
    int8_t* tiles = kept.tiles.data() + kept.tile_place(token);
    for (const Segment& segment : kept.segments) {
        const int8_t* from = quantized + segment.pass_begin * kPassRows;
        int8_t* to = tiles + segment.step * kTileBytes;
        for (size_t k = 0; k < segment.rows(); k += kTileRows, to += kTileBytes) {
            const size_t n = std::min(kTileRows, segment.rows() - k);
            std::memcpy(to, from + k, n);
            std::memset(to + n, 0, kTileRows - n);
        }
    }
}

// The values of one token among several: channels that it does not keep itself, and padding, are 0.
void copy_values(const Site& site, const float* x, KeptRows& kept, size_t token) {
    const size_t in = site.weights.in, length = kept.length();
    float* value = kept.value.data() + token * length;
    x += token * in;
    // Every channel, in order. (A padded list of fewer may be as long.)
    if (kept.tokens > kMaxUnionTokens && length == in && kept.padding.empty()) {
        mask(x, site.threshold, in, value);
        return;
    }
    static thread_local std::vector<float> own;
    float* masked = grow(own, in);
    mask(x, site.threshold, in, masked);
    for (size_t k = 0; k < length; ++k) value[k] = masked[kept.row[k]];
    for (const Range& range : kept.padding) std::fill(value + range.begin, value + range.end, 0.0f);
}

// List the channels that any token keeps, and their values.
void keep_rows(const Site& site, const float* x, size_t tokens, const Kernels& kernels, const Threads& threads) {
    Scratch& s = scratch();
    KeptRows& kept = s.kept;
    const size_t in = site.weights.in, group = site.weights.group;
    const bool is_exact = is_integer(site.weights) && site.is_exact;
    const bool is_tiled = is_integer(site.weights) && !is_exact && tokens >= kernels.min_tile_tokens;
    const size_t repeats = is_exact ? kExactTerms : 1, segment_rows = tokens > 1 && !is_exact ? kSharedSegmentRows : kSegmentRows;
    // Each group may need up to one pass of padding; compact() writes 16 entries too far.
    const size_t longest = repeats * (in + (in + group - 1) / group * kPassRows);
    grow(kept.row, longest + kPrefetchPasses * kPassRows + 16);
    grow(kept.value, longest + 16);
    const bool is_union = tokens > 1 && tokens <= kMaxUnionTokens;
    if (is_union) {
        s.is_kept.assign(in, 0.0f);
        grow(s.nothing, in);
        for (size_t t = 0; t < tokens; ++t) note_kept(x + t * in, site.threshold, in, s.is_kept.data());
    }
    kept.segments.clear();
    kept.padding.clear();
    size_t length = 0;
    for (size_t begin = 0; begin < in; begin += group) {
        const size_t end = std::min(in, begin + group);
        uint32_t* row = kept.row.data() + length;
        size_t count = 0;
        if (tokens == 1)
            count = kernels.compact(x, site.threshold, begin, end, row, kept.value.data() + length);
        else if (is_union)
            count = kernels.compact(s.is_kept.data(), s.nothing.data(), begin, end, row, kept.value.data() + length);
        else
            for (; begin + count < end; ++count) row[count] = static_cast<uint32_t>(begin + count);
        length = append_segments(kept, length, count, begin / group, segment_rows, is_exact);
    }
    std::fill_n(kept.row.data() + length, kPrefetchPasses * kPassRows, length ? kept.row[length - 1] : 0);
    kept.tokens = tokens;
    kept.passes = length / kPassRows;
    kept.tile_steps = 0;
    grow(kept.value, tokens * length);
    if (is_integer(site.weights)) {
        grow(kept.quantized, tokens * length);
        grow(kept.scale, tokens * kept.segments.size());
        grow(kept.pass_sum, tokens * kept.passes);
        grow(kept.segment_sum, tokens * kept.segments.size());
    }
    if (is_tiled) lay_out_tiles(kept);
    grow(kept.sum, tokens);
    if (tokens == 1) {
        if (is_integer(site.weights)) quantize_token(kept, 0, is_exact, kernels);
        return;
    }
    threads.run(tokens, [&](size_t token) {
        copy_values(site, x, kept, token);
        if (is_integer(site.weights)) quantize_token(kept, token, is_exact, kernels);
        if (is_tiled) tile_token(kept, token);
    });
}

// Write the outputs [begin, end) of one token. u8 weights have a scale and a zero point for each output.
void write_outputs(const Site& site, size_t token, size_t begin, size_t end, const float* sums, float sum,
                   const std::vector<Output>& outputs) {
    const Weights& weights = site.weights;
    const auto* scale = static_cast<const float*>(weights.scale);
    const auto* zero = static_cast<const float*>(weights.zero);
    for (const Output& output : outputs) {
        const size_t first = std::max(begin, output.begin), last = std::min(end, output.end);
        if (first >= last) continue;
        float* y = output.data + token * (output.end - output.begin) + (first - output.begin);
        const float* from = sums + (first - begin);
        if (weights.type != WeightType::u8)
            std::memcpy(y, from, (last - first) * sizeof(float));
        else
            scale_outputs(from, scale + first, zero + first, kMiddle, sum, last - first, y);
        if (site.bias) add(site.bias + first, last - first, y);
    }
}

// The outputs of tokens of which nothing is kept.
void write_nothing(const Site& site, size_t tokens, const std::vector<Output>& outputs) {
    for (const Output& output : outputs)
        for (size_t i = 0, width = output.end - output.begin; i < tokens; ++i) {
            std::fill_n(output.data + i * width, width, 0.0f);
            if (site.bias) add(site.bias + output.begin, width, output.data + i * width);
        }
}

// Lay the passes of all panels end to end and cut them into equal shares. Parts of share c are
// [starts[c], starts[c + 1]).
void share_passes(const Weights& weights, size_t passes, size_t shares, std::vector<Part>& parts,
                  std::vector<size_t>& starts) {
    parts.clear();
    starts.assign(1, 0);
    size_t work = 0, done = 0, panel = 0, pass = 0;
    for (size_t p = 0; p < weights.panels(); ++p) work += passes * weights.row_bytes(p);
    for (size_t share = 1; share <= shares; ++share) {
        const size_t goal = work * share / shares;
        while (done < goal) {
            const size_t cost = weights.row_bytes(panel);
            const size_t end = std::min(passes, pass + (goal - done + cost - 1) / cost);
            parts.push_back({panel, pass, end});
            done += (end - pass) * cost;
            pass = end == passes ? 0 : end;
            panel += end == passes;
        }
        starts.push_back(parts.size());
    }
}

void multiply_one(const Site& site, const std::vector<Output>& outputs, const Kernels& kernels, const Threads& threads) {
    const Weights& weights = site.weights;
    Scratch& s = scratch();
    const KeptRows& kept = s.kept;
    const size_t width = weights.panel_outputs(), passes = kept.passes;
    share_passes(weights, passes, threads.count, s.parts, s.starts);
    float* all_sums = grow(s.sums, s.parts.size() * width);
    const auto write = [&](size_t panel, const float* sums) {
        write_outputs(site, 0, panel * width, panel * width + weights.width(panel), sums, kept.sum[0], outputs);
    };
    const auto is_whole = [&](const Part& part) { return part.pass_begin == 0 && part.pass_end == passes; };
    threads.run(threads.count, [&](size_t share) {
        for (size_t i = s.starts[share]; i < s.starts[share + 1]; ++i) {
            const Part& part = s.parts[i];
            float* sums = all_sums + i * width;
            std::fill(sums, sums + width, 0.0f);
            kernels.multiply(weights, part.panel, kept, 0, part.pass_begin, part.pass_end, sums);
            if (is_whole(part)) write(part.panel, sums);
        }
    });
    // A panel's parts follow each other.
    for (size_t i = 0, next; i < s.parts.size(); i = next) {
        const size_t panel = s.parts[i].panel;
        float* sums = all_sums + i * width;
        for (next = i + 1; next < s.parts.size() && s.parts[next].panel == panel; ++next)
            add(all_sums + next * width, weights.width(panel), sums);
        if (!is_whole(s.parts[i])) write(panel, sums);
    }
}

void multiply_many(const Site& site, size_t tokens, const std::vector<Output>& outputs, const Kernels& kernels,
                   const Threads& threads) {
    const Weights& weights = site.weights;
    const KeptRows& kept = scratch().kept;
    const size_t panel_outputs = weights.panel_outputs();
    for (size_t token = 0; token < tokens; token += kBlockTokens) {
        const size_t token_end = std::min(tokens, token + kBlockTokens);
        // Tiles of about the same size, enough for every thread to end at about the same time. Few tokens wait for
        // memory: long reads gain more.
        const size_t fitting = kBlockSums / (token_end - token);
        const size_t even = weights.out / ((tokens < kManyTokens ? 2 : kTilesPerThread) * threads.count);
        const size_t most = std::max(kTileOutputs, std::min(fitting, even));
        const size_t whole = std::min(panel_outputs, weights.out), tiles = (whole + most - 1) / most;  // in a panel
        const size_t width = ((whole + tiles - 1) / tiles + kTileOutputs - 1) / kTileOutputs * kTileOutputs;
        threads.run(weights.panels() * tiles, [&, token](size_t task) {
            static thread_local std::vector<float> block;
            const size_t panel = task / tiles, begin = task % tiles * width;
            const size_t end = std::min(weights.width(panel), begin + width);
            if (begin >= end) return;
            const size_t n = (token_end - token) * (end - begin);
            float* sums = grow(block, n);
            std::fill(sums, sums + n, 0.0f);
            kernels.multiply_tokens(weights, panel, begin, end, kept, token, token_end, sums);
            const size_t offset = panel * panel_outputs;
            for (size_t t = token; t < token_end; ++t)
                write_outputs(site, t, offset + begin, offset + end, sums + (t - token) * (end - begin),
                              kept.sum[t], outputs);
        });
    }
}

}  // namespace

void multiply_site(const Site& site, const float* x, size_t tokens, const std::vector<Output>& outputs,
                   const Kernels& kernels, const Threads& threads) {
    if (tokens == 0) return;
    keep_rows(site, x, tokens, kernels, threads);
    if (scratch().kept.passes == 0)
        write_nothing(site, tokens, outputs);
    else if (tokens == 1)
        multiply_one(site, outputs, kernels, threads);
    else
        multiply_many(site, tokens, outputs, kernels, threads);
}

}  // namespace actsparse

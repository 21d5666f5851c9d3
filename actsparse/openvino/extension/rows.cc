#include "rows.hpp"

#include <algorithm>
#include <cstring>

#include "elementwise.hpp"
#include "scratch.hpp"

namespace actsparse {
namespace {

// Tokens whose inputs stay in the first-level cache, or the second at worst, while all rows go by.
constexpr size_t kBlockTokens = 32;  // bits of a word
constexpr size_t kLane = 4;
// How many rows ahead kernels fetch kept rows: they lie anywhere, so that no hardware prefetcher finds them.
constexpr size_t kAhead = 2 * kDotRows;

// The inputs of some tokens, all in the memory of the thread that calls multiply_rows.
struct Scratch {
    std::vector<float> value, rest, scale, line_sum;
    std::vector<int8_t> quantized;
    std::vector<int32_t> start;
    std::vector<RowInput> inputs;
    std::vector<uint32_t> rows, keepers;
};

Scratch& scratch() {
    static thread_local Scratch s;
    return s;
}

// Where quantize_input writes; see RowInput.
struct Quantized {
    int8_t* quantized;
    float* scale;
    int32_t* start;
    float* line_sum;
};

// Returns the sum of what the quantized activations stand for.
float quantize_input(const float* value, float* rest, size_t in, size_t terms, const Quantized& to, const Kernels& kernels) {
    int32_t pass_sum[kSegmentRows / kPassRows];
    std::fill_n(to.line_sum, in / kRowLine, 0.0f);
    for (size_t term = 0; term < terms; ++term) {
        // What rounding leaves of one term is the next one's value.
        const float* from = term == 0 ? value : rest;
        for (size_t k = 0; k < in; k += kSegmentRows) {
            const size_t at = term * in + k;
            float& scale = to.scale[at / kSegmentRows];
            kernels.quantize(from + k, kSegmentRows, to.quantized + at, &scale, pass_sum, term + 1 < terms ? rest + k : nullptr);
            int32_t sum = 0;
            for (const int32_t s : pass_sum) sum += s;
            to.line_sum[k / kRowLine] += scale * static_cast<float>(sum);
        }
    }
    if (to.start)
        for (size_t lane = 0; lane < terms * in / kLane; ++lane) {
            const int8_t* q = to.quantized + lane * kLane;
            to.start[lane] = -kMiddle * (q[0] + q[1] + q[2] + q[3]);
        }
    float sum = 0;
    for (size_t line = 0; line < in / kRowLine; ++line) sum += to.line_sum[line];
    return sum;
}

void prepare(const RowWeights& weights, bool is_exact, const float* x, size_t in_features, size_t tokens,
             const Kernels& kernels, const Threads& threads) {
    Scratch& s = scratch();
    const size_t in = weights.in;
    const bool is_integer = weights.type == WeightType::u8 || weights.type == WeightType::u4;
    const size_t terms = !is_integer ? 0 : is_exact ? kExactTerms : 1;
    const bool has_start = is_exact && weights.type == WeightType::u8;
    float* value = grow(s.value, tokens * in);
    float* rest = grow(s.rest, tokens * in);
    int8_t* quantized = grow(s.quantized, tokens * terms * in);
    float* scale = grow(s.scale, tokens * terms * in / kSegmentRows);
    int32_t* start = grow(s.start, has_start ? tokens * terms * in / kLane : 0);
    float* line_sum = grow(s.line_sum, tokens * in / kRowLine);
    RowInput* inputs = grow(s.inputs, tokens);
    threads.run(tokens, [&](size_t t) {
        float* v = value + t * in;
        std::memcpy(v, x + t * in_features, in_features * sizeof(float));
        std::fill(v + in_features, v + in, 0.0f);
        const size_t offset = t * terms * in;
        const Quantized to{quantized + offset, scale + offset / kSegmentRows, has_start ? start + offset / kLane : nullptr,
                           line_sum + t * in / kRowLine};
        const float sum = quantize_input(v, rest + t * in, in, terms, to, kernels);
        inputs[t] = {terms, v, to.quantized, to.scale, to.start, to.line_sum, sum};
    });
}

// Zero what the gates leave out of [tokens][out], and list the rows that some token keeps; returns how many. Bit t of
// keepers[j] says whether token t keeps row j.
size_t list_rows(const float* threshold, size_t out, size_t tokens, float* gate, uint32_t* keepers, uint32_t* rows,
                 const Threads& threads) {
    const size_t shares = tokens == 1 ? 1 : threads.count;
    threads.run(shares, [&](size_t share) {
        const size_t begin = out * share / shares, end = out * (share + 1) / shares;
        std::fill(keepers + begin, keepers + end, 0);
        for (size_t t = 0; t < tokens; ++t)
            mask_and_note(threshold + begin, end - begin, 1u << t, gate + t * out + begin, keepers + begin);
    });
    size_t kept = 0;
    for (size_t j = 0; j < out; ++j) {
        rows[kept] = static_cast<uint32_t>(j);
        kept += keepers[j] != 0;
    }
    return kept;
}

// gate[t][row] *= row times input t, of all tokens that keep it.
void multiply_row(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* inputs, uint32_t keepers,
                  float* gate, const Kernels& kernels) {
    while (keepers) {
        const RowInput* chosen[kDotTokens];
        size_t token[kDotTokens], count = 0;
        float y[kDotTokens];
        for (; keepers && count < kDotTokens; keepers &= keepers - 1) {
            token[count] = static_cast<size_t>(__builtin_ctz(keepers));
            chosen[count] = inputs + token[count];
            ++count;
        }
        kernels.dot_row(weights, row, fetched, chosen, count, y);
        for (size_t i = 0; i < count; ++i) gate[token[i] * weights.out + row] *= y[i];
    }
}

// The rows of a list, which goes on for kAhead rows, for all tokens.
void multiply_list(const RowWeights& weights, const uint32_t* rows, size_t count, const RowInput* inputs, size_t tokens,
                   const uint32_t* keepers, float* gate, const Kernels& kernels) {
    size_t i = 0;
    if (tokens == 1)
        for (; i + kDotRows <= count; i += kDotRows) {
            float y[kDotRows];
            kernels.dot_rows(weights, rows + i, rows + i + kAhead, inputs[0], y);
            for (size_t r = 0; r < kDotRows; ++r) gate[rows[i + r]] *= y[r];
        }
    for (; i < count; ++i) multiply_row(weights, rows[i], rows[i + kAhead], inputs, keepers[rows[i]], gate, kernels);
}

}  // namespace

void multiply_rows(const RowWeights& weights, const float* threshold, bool is_exact, const float* x,
                   size_t in_features, size_t tokens, float* gate, const Kernels& kernels, const Threads& threads) {
    const bool is_integer = weights.type == WeightType::u8 || weights.type == WeightType::u4;
    if (is_integer && !is_exact && tokens >= kernels.min_tile_tokens)
        return kernels.multiply_rows(weights, threshold, x, in_features, tokens, gate, kernels, threads);
    for (size_t begin = 0; begin < tokens; begin += kBlockTokens) {
        const size_t count = std::min(kBlockTokens, tokens - begin);
        prepare(weights, is_exact, x + begin * in_features, in_features, count, kernels, threads);
        const RowInput* inputs = scratch().inputs.data();
        float* block = gate + begin * weights.out;
        uint32_t* rows = grow(scratch().rows, weights.out + kAhead);
        uint32_t* keepers = grow(scratch().keepers, weights.out);
        const size_t kept = list_rows(threshold, weights.out, count, block, keepers, rows, threads);
        if (kept == 0) continue;
        std::fill_n(rows + kept, kAhead, rows[kept - 1]);
        // In equal shares: kept rows lie anywhere.
        threads.run(threads.count, [&](size_t share) {
            const size_t first = kept * share / threads.count, end = kept * (share + 1) / threads.count;
            multiply_list(weights, rows + first, end - first, inputs, count, keepers, block, kernels);
        });
    }
}

}  // namespace actsparse

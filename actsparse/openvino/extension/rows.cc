#include "rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scratch.hpp"

namespace actsparse {
namespace {

// Tokens whose inputs stay in the second-level cache while all rows go by.
constexpr size_t kBlockTokens = 32;
constexpr size_t kLane = 4;

// The inputs of some tokens, all in the memory of the thread that calls multiply_rows.
struct Scratch {
    std::vector<float> value, rest, lane_scale;
    std::vector<int8_t> quantized;
    std::vector<int32_t> lane_sum;
    std::vector<RowInput> inputs;
    std::vector<uint32_t> rows;
};

Scratch& scratch() {
    static thread_local Scratch s;
    return s;
}

void quantize_input(float* value, float* rest, size_t in, size_t terms, int8_t* quantized, float* lane_scale,
                    int32_t* lane_sum, const Kernels& kernels) {
    int32_t pass_sum[kSegmentRows / kPassRows];
    for (size_t term = 0; term < terms; ++term) {
        // What rounding leaves of one term is the next one's value.
        const float* from = term == 0 ? value : rest;
        for (size_t k = 0; k < in; k += kSegmentRows) {
            float scale;
            kernels.quantize(from + k, kSegmentRows, quantized + k, &scale, pass_sum, term + 1 < terms ? rest + k : nullptr);
            std::fill_n(lane_scale + k / kLane, kSegmentRows / kLane, scale);
        }
        for (size_t lane = 0; lane < in / kLane; ++lane) {
            const int8_t* q = quantized + lane * kLane;
            lane_sum[lane] = q[0] + q[1] + q[2] + q[3];
        }
        quantized += in;
        lane_scale += in / kLane;
        lane_sum += in / kLane;
    }
}

// The sum of what the quantized activations stand for, which a zero point is taken off of.
float sum_of(const RowInput& x, size_t in) {
    float sum = 0;
    for (size_t lane = 0; lane < x.terms * in / kLane; ++lane)
        sum += x.lane_scale[lane] * static_cast<float>(x.lane_sum[lane]);
    return sum;
}

void prepare(const RowWeights& weights, bool is_exact, const float* x, size_t in_features, size_t tokens,
             const Kernels& kernels, const Threads& threads) {
    Scratch& s = scratch();
    const size_t in = weights.in;
    const bool is_integer = weights.type == WeightType::u8 || weights.type == WeightType::u4;
    const size_t terms = !is_integer ? 0 : is_exact ? kExactTerms : 1;
    float* value = grow(s.value, tokens * in);
    float* rest = grow(s.rest, tokens * in);
    int8_t* quantized = grow(s.quantized, tokens * terms * in);
    float* lane_scale = grow(s.lane_scale, tokens * terms * in / kLane);
    int32_t* lane_sum = grow(s.lane_sum, tokens * terms * in / kLane);
    RowInput* inputs = grow(s.inputs, tokens);
    threads.run(tokens, [&](size_t t) {
        float* v = value + t * in;
        std::memcpy(v, x + t * in_features, in_features * sizeof(float));
        std::fill(v + in_features, v + in, 0.0f);
        const size_t offset = t * terms * in;
        inputs[t] = {terms, v, quantized + offset, lane_scale + offset / kLane, lane_sum + offset / kLane};
        quantize_input(v, rest + t * in, in, terms, quantized + offset, lane_scale + offset / kLane,
                       lane_sum + offset / kLane, kernels);
    });
}

}  // namespace

void multiply_rows(const RowWeights& weights, const float* threshold, bool is_exact, const float* x,
                   size_t in_features, size_t tokens, float* gate, const Kernels& kernels, const Threads& threads) {
    const auto* scale = static_cast<const float*>(weights.scale);
    const auto* zero = static_cast<const float*>(weights.zero);
    for (size_t begin = 0; begin < tokens; begin += kBlockTokens) {
        const size_t count = std::min(kBlockTokens, tokens - begin);
        prepare(weights, is_exact, x + begin * in_features, in_features, count, kernels, threads);
        const RowInput* inputs = scratch().inputs.data();
        float sums[kBlockTokens];
        for (size_t t = 0; t < count; ++t) sums[t] = sum_of(inputs[t], weights.in);
        float* block = gate + begin * weights.out;
        // Rows that some token keeps, in equal shares: kept rows lie anywhere.
        uint32_t* rows = grow(scratch().rows, weights.out);
        size_t kept = 0;
        for (size_t j = 0; j < weights.out; ++j) {
            bool is_kept = false;
            for (size_t t = 0; t < count; ++t) {
                float& g = block[t * weights.out + j];
                if (std::fabs(g) <= threshold[j])
                    g = 0;
                else
                    is_kept = true;
            }
            rows[kept] = static_cast<uint32_t>(j);
            kept += is_kept;
        }
        threads.run(threads.count, [&](size_t share) {
            for (size_t i = kept * share / threads.count; i < kept * (share + 1) / threads.count; ++i) {
                const size_t j = rows[i];
                for (size_t t = 0; t < count; ++t) {
                    float& g = block[t * weights.out + j];
                    if (g == 0) continue;
                    float y = kernels.dot_row(weights, j, inputs[t]);
                    if (weights.type == WeightType::u8) y = scale[j] * (y - (zero[j] - kMiddle) * sums[t]);
                    g *= y;
                }
            }
        });
    }
}

}  // namespace actsparse

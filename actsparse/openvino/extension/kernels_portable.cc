// Kernels in plain C++: for any processor, and what the others are tested against.
#include <algorithm>
#include <cmath>
#include <limits>

#include "float16.hpp"
#include "kernels.hpp"
#include "rows.hpp"
#include "segments.hpp"

namespace actsparse {
namespace {

size_t compact(const float* x, const float* threshold, size_t begin, size_t end, uint32_t* row, float* value) {
    size_t n = 0;
    for (size_t j = begin; j < end; ++j) {
        row[n] = static_cast<uint32_t>(j);
        value[n] = x[j];
        n += !(std::fabs(x[j]) <= threshold[j]);
    }
    return n;
}

void quantize(const float* value, size_t n, int8_t* quantized, float* scale, int32_t* pass_sum, float* rest) {
    float largest = 0;
    bool is_finite = true;
    for (size_t k = 0; k < n; ++k) {
        largest = std::max(largest, std::fabs(value[k]));
        is_finite = is_finite && std::isfinite(value[k]);
    }
    *scale = is_finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    // The reciprocal of a denormal scale overflows: such values are as good as 0.
    const float inverse = is_finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (size_t k = 0; k < n; ++k) {
        quantized[k] = static_cast<int8_t>(std::lrint(is_finite ? value[k] * inverse : 0.0f));
        if (rest) rest[k] = std::fma(-*scale, static_cast<float>(quantized[k]), value[k]);
    }
    for (size_t pass = 0; pass < n / kPassRows; ++pass) {
        pass_sum[pass] = 0;
        for (size_t k = 0; k < kPassRows; ++k) pass_sum[pass] += quantized[pass * kPassRows + k];
    }
}

// The output whose weight is byte `byte` of a line of u8 weights: see Weights.
size_t output_of_byte(size_t byte) { return byte / 4 % 4 * 16 + byte / 16 * 4 + byte % 4; }

float group_scale(const Weights& weights, size_t index) {
    return weights.is_scale_f16 ? from_f16(static_cast<const uint16_t*>(weights.scale)[index])
                                : static_cast<const float*>(weights.scale)[index];
}

// acc[o - begin] += the products of passes [pass_begin, pass_end), which lie in one segment, for outputs [begin, end).
void multiply_part(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept, size_t token,
                   size_t segment, size_t pass_begin, size_t pass_end, float* acc) {
    const size_t row_bytes = weights.row_bytes(panel);
    const uint8_t* data = weights.panel_data(panel);
    const size_t first = pass_begin * kPassRows, last = pass_end * kPassRows;
    if (weights.type == WeightType::f16 || weights.type == WeightType::bf16) {
        const float* value = kept.value.data() + token * kept.length();
        for (size_t k = first; k < last; ++k) {
            const uint16_t* row = reinterpret_cast<const uint16_t*>(data + kept.row[k] * row_bytes);
            for (size_t o = begin; o < end; ++o)
                acc[o - begin] += value[k] * (weights.type == WeightType::f16 ? from_f16(row[o]) : from_bf16(row[o]));
        }
        return;
    }
    const int8_t* quantized = kept.quantized.data() + token * kept.length();
    const float scale = kept.scale[token * kept.segments.size() + segment];
    int32_t sum = 0;
    for (size_t pass = pass_begin; pass < pass_end; ++pass) sum += kept.pass_sum[token * kept.passes + pass];
    const size_t line_outputs = outputs_per_bytes(weights.type, kLineBytes);
    const size_t group = kept.segments[segment].group;
    for (size_t line = begin / line_outputs; line < end / line_outputs; ++line) {
        int32_t dot[2 * kLineBytes] = {};
        for (size_t k = first; k < last; ++k) {
            const uint8_t* row = data + kept.row[k] * row_bytes + line * kLineBytes;
            const int32_t q = quantized[k];
            if (weights.type == WeightType::u8) {
                for (size_t byte = 0; byte < kLineBytes; ++byte) dot[output_of_byte(byte)] += q * row[byte];
            } else {
                for (size_t byte = 0; byte < kLineBytes; ++byte) {
                    dot[output_of_byte(byte)] += q * (row[byte] & 15);
                    dot[kLineBytes + output_of_byte(byte)] += q * (row[byte] >> 4);
                }
            }
        }
        for (size_t i = 0; i < line_outputs; ++i) {
            const size_t o = line * line_outputs + i;
            if (weights.type == WeightType::u8) {
                acc[o - begin] += scale * static_cast<float>(dot[i] - kMiddle * sum);
            } else {
                const size_t index = group * weights.out + panel * weights.panel_outputs() + o;
                const int32_t zero = static_cast<const uint8_t*>(weights.zero)[index];
                acc[o - begin] += scale * group_scale(weights, index) * static_cast<float>(dot[i] - zero * sum);
            }
        }
    }
}

}  // namespace

const Kernels portable_kernels{
    "portable", compact, quantize, multiply_by_segments<multiply_part>,
    multiply_tokens_by_segments<multiply_part>, dot_rows_portable, dot_row_portable};

}  // namespace actsparse

// Dot products of rows in plain C++: for any processor, and what the others are tested against.
#include "rows.hpp"

namespace actsparse {
namespace {

int weight_at(const RowWeights& weights, const uint8_t* row, size_t k) {
    if (weights.type == WeightType::u8) return row[k];
    const uint8_t both = row[k / 64 * 32 + k % 32];
    return k % 64 < 32 ? both & 15 : both >> 4;
}

float dot_halves(const RowWeights& weights, size_t j, const RowInput& x) {
    const auto* halves = reinterpret_cast<const uint16_t*>(weights.row(j));
    float total = 0;
    for (size_t k = 0; k < weights.in; ++k)
        total += (weights.type == WeightType::f16 ? from_f16(halves[k]) : from_bf16(halves[k])) * x.value[k];
    return total;
}

// The channels of one group, as if weights were w - middle.
float dot_group(const RowWeights& weights, size_t j, size_t group, int middle, const RowInput& x) {
    const uint8_t* row = weights.row(j);
    float sum = 0;
    for (size_t term = 0; term < x.terms; ++term)
        for (size_t k = group * weights.group; k < (group + 1) * weights.group; k += kSegmentRows) {
            int dot = 0;
            for (size_t i = k; i < k + kSegmentRows; ++i)
                dot += (weight_at(weights, row, i) - middle) * x.quantized[term * weights.in + i];
            sum += x.scale[(term * weights.in + k) / kSegmentRows] * static_cast<float>(dot);
        }
    return sum;
}

float dot_row(const RowWeights& weights, size_t j, const RowInput& x) {
    if (x.terms == 0) return dot_halves(weights, j, x);
    if (weights.type == WeightType::u8) {
        const float zero = static_cast<const float*>(weights.zero)[j];
        const float sum = dot_group(weights, j, 0, kMiddle, x) - (zero - kMiddle) * x.sum;
        return static_cast<const float*>(weights.scale)[j] * sum;
    }
    float total = 0;
    for (size_t g = 0; g < weights.groups(); ++g) {
        const size_t index = j * weights.groups() + g;
        const int zero = static_cast<const uint8_t*>(weights.zero)[index];
        total += weights.group_scale(index) * dot_group(weights, j, g, zero, x);
    }
    return total;
}

}  // namespace

void dot_rows_portable(const RowWeights& weights, const uint32_t* rows, const uint32_t*, const RowInput& input, float* y) {
    for (size_t r = 0; r < kDotRows; ++r) y[r] = dot_row(weights, rows[r], input);
}

void dot_row_portable(const RowWeights& weights, uint32_t row, uint32_t, const RowInput* const* inputs, size_t count,
                      float* y) {
    for (size_t t = 0; t < count; ++t) y[t] = dot_row(weights, row, *inputs[t]);
}

}  // namespace actsparse

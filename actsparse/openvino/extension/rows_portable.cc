// A row's dot product in plain C++: for any processor, and what the others are tested against.
#include "float16.hpp"
#include "rows.hpp"

namespace actsparse {
namespace {

int weight_at(const RowWeights& weights, const uint8_t* row, size_t k) {
    if (weights.type == WeightType::u8) return row[k];
    const uint8_t both = row[k / 64 * 32 + k % 32];
    return k % 64 < 32 ? both & 15 : both >> 4;
}

float scale_at(const RowWeights& weights, size_t index) {
    return weights.is_scale_f16 ? from_f16(static_cast<const uint16_t*>(weights.scale)[index])
                                : static_cast<const float*>(weights.scale)[index];
}

}  // namespace

float dot_row_portable(const RowWeights& weights, size_t j, const RowInput& x) {
    const uint8_t* row = weights.row(j);
    float total = 0;
    if (x.terms == 0) {
        const auto* halves = reinterpret_cast<const uint16_t*>(row);
        for (size_t k = 0; k < weights.in; ++k)
            total += (weights.type == WeightType::f16 ? from_f16(halves[k]) : from_bf16(halves[k])) * x.value[k];
        return total;
    }
    const bool is_u4 = weights.type == WeightType::u4;
    const size_t groups = weights.in / weights.group;
    for (size_t g = 0; g < groups; ++g) {
        const int middle = is_u4 ? static_cast<const uint8_t*>(weights.zero)[j * groups + g] : kMiddle;
        float sum = 0;
        for (size_t term = 0; term < x.terms; ++term)
            for (size_t lane = g * weights.group / 4; lane < (g + 1) * weights.group / 4; ++lane) {
                const int8_t* q = x.quantized + term * weights.in + 4 * lane;
                int dot = 0;
                for (size_t i = 0; i < 4; ++i) dot += (weight_at(weights, row, 4 * lane + i) - middle) * q[i];
                sum += x.lane_scale[term * weights.in / 4 + lane] * static_cast<float>(dot);
            }
        total += is_u4 ? scale_at(weights, j * groups + g) * sum : sum;
    }
    return total;
}

}  // namespace actsparse

// Some rows of a matrix times a vector: an up projection of which the gate tells the rows that matter.
#pragma once

#include <vector>

#include "kernels.hpp"
#include "threads.hpp"

namespace actsparse {

// Inputs are padded to this many channels, with weights and activations of 0.
constexpr size_t kRowLine = 64;

// Weights of one layer, row by row: [out][padded in]. u8, f16 and bf16 in order; of u4, byte b of each 32 holds
// weight b of 64 in its low nibble and weight 32 + b in its high one.
struct RowWeights {
    WeightType type;
    size_t in;           // padded to kRowLine
    size_t out;
    size_t group;        // input channels that share a scale, a multiple of kRowLine: `in` for u8
    const uint8_t* data;
    const void* scale;   // u8: float [out]; u4: f16 or f32 [out][in / group]; f16, bf16: none
    bool is_scale_f16;
    const void* zero;    // u8: float [out]; u4: uint8 [out][in / group]

    size_t row_bytes() const { return type == WeightType::u8 ? in : type == WeightType::u4 ? in / 2 : in * 2; }
    const uint8_t* row(size_t j) const { return data + j * row_bytes(); }
};

// One token's input, ready for a kernel.
struct RowInput {
    size_t terms;              // of INT8 that an activation is the sum of; 0 for f16 and bf16 weights
    const float* value;        // [in]
    const int8_t* quantized;   // [terms][in]
    const float* lane_scale;   // [terms][in / 4]: of four activations (kSegmentRows share one)
    const int32_t* lane_sum;   // [terms][in / 4]: sum of four quantized activations
};

// Row j of the weights times the input. u8: as if weights were w - kMiddle, without scale and zero point.
float dot_row_portable(const RowWeights& weights, size_t j, const RowInput& x);
#if defined(__x86_64__)
float dot_row_avx2(const RowWeights& weights, size_t j, const RowInput& x);
float dot_row_avx512(const RowWeights& weights, size_t j, const RowInput& x);
#endif

// gate[t][j] = gate[t][j] * (row j . x[t]) where |gate[t][j]| > threshold[j] (or NaN), else 0.
// x is [tokens][in_features], in_features <= weights.in.
void multiply_rows(const RowWeights& weights, const float* threshold, bool is_exact, const float* x,
                   size_t in_features, size_t tokens, float* gate, const Kernels& kernels, const Threads& threads);

}  // namespace actsparse

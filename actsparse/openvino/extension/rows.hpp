// Some rows of a matrix times a vector: an up projection of which the gate tells the rows that matter.
#pragma once

#include <vector>

#include "float16.hpp"
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
    size_t groups() const { return in / group; }
    float group_scale(size_t index) const {
        return is_scale_f16 ? from_f16(static_cast<const uint16_t*>(scale)[index]) : static_cast<const float*>(scale)[index];
    }
};

// What a kernel takes at a time: so many rows for one token, or one row for so many tokens at most, so that what it loads
// of the rest is used by all of them.
constexpr size_t kDotRows = 8;
constexpr size_t kDotTokens = 4;

// One token's input, ready for a kernel.
struct RowInput {
    size_t terms;              // of INT8 that an activation is the sum of; 0 for f16 and bf16 weights
    const float* value;        // [in]
    const int8_t* quantized;   // [terms][in]
    const float* scale;        // [terms][in / kSegmentRows]
    const int32_t* start;      // exact u8 only, else null: [terms][in / 4], -kMiddle times the sum of four of quantized
    const float* line_sum;     // [in / kRowLine]: the sum of what quantized stands for, all terms
    float sum;                 // of line_sum
};

// y[r] = row rows[r] times the input, for kDotRows rows; kDotRows others are fetched meanwhile.
// y[t] = a row times input t, for up to kDotTokens inputs.
#define ACTSPARSE_DOTS(isa)                                                                                            \
    void dot_rows_##isa(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched,                      \
                        const RowInput& input, float* y);                                                              \
    void dot_row_##isa(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* const* inputs,       \
                       size_t count, float* y)
ACTSPARSE_DOTS(portable);
#if defined(__x86_64__)
ACTSPARSE_DOTS(avx2);
ACTSPARSE_DOTS(avx512);
#endif
#if defined(ACTSPARSE_NEON)
ACTSPARSE_DOTS(neon);
#endif
#undef ACTSPARSE_DOTS
#if defined(ACTSPARSE_AMX)
void multiply_rows_amx(const RowWeights& weights, const float* threshold, const float* x, size_t in_features,
                       size_t tokens, float* gate, const Kernels& kernels, const Threads& threads);
#endif

// gate[t][j] = gate[t][j] * (row j . x[t]) where |gate[t][j]| > threshold[j] (or NaN), else 0.
// x is [tokens][in_features], in_features <= weights.in.
void multiply_rows(const RowWeights& weights, const float* threshold, bool is_exact, const float* x,
                   size_t in_features, size_t tokens, float* gate, const Kernels& kernels, const Threads& threads);

}  // namespace actsparse

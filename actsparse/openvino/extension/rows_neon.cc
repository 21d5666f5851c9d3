// Dot products of rows for ARM with the dot product instruction: weights less their middle as 8-bit integers, 32 at a
// time.
#include "kernels.hpp"

#if defined(ACTSPARSE_NEON)
#include "neon.hpp"
#include "row_tile.hpp"

#define INLINE DOTPROD ALWAYS_INLINE

namespace actsparse {
namespace {

// sums[r][t] = the products of the channels [begin, end), as if weights were w - middle[r].
template <bool kIsU4, size_t kRows, size_t kTokens>
INLINE void dot_group(const RowTile<kRows, kTokens>& tile, size_t in, size_t begin, size_t end,
                      const uint8x16_t (&middle)[kRows], float32x4_t (&sums)[kRows][kTokens]) {
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) sums[r][t] = vdupq_n_f32(0.0f);
    for (size_t k = begin; k < end; k += kSegmentRows) {
        tile.fetch(kIsU4 ? k / 2 : k);
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) {
            const uint8_t* w = tile.row[r] + (kIsU4 ? k / 64 * 32 : k);
            const int8x16_t low = load_weights<kIsU4>(w, k % 64, middle[r]);
            const int8x16_t high = load_weights<kIsU4>(w + 16, k % 64, middle[r]);
#pragma GCC unroll 4
            for (size_t t = 0; t < kTokens; ++t) {
                const RowInput& x = *tile.input[t];
                for (size_t term = 0; term < x.terms; ++term) {
                    const int8_t* q = x.quantized + term * in + k;
                    const int32x4_t dot = vdotq_s32(vdotq_s32(vdupq_n_s32(0), low, vld1q_s8(q)), high, vld1q_s8(q + 16));
                    const float scale = x.scale[(term * in + k) / kSegmentRows];
                    sums[r][t] = vfmaq_n_f32(sums[r][t], vcvtq_f32_s32(dot), scale);
                }
            }
        }
    }
}

template <size_t kRows, size_t kTokens>
INLINE void dot_u8(const RowWeights& weights, const uint32_t* rows, const RowTile<kRows, kTokens>& tile, float* y) {
    float32x4_t sums[kRows][kTokens];
    uint8x16_t middle[kRows];
    for (size_t r = 0; r < kRows; ++r) middle[r] = vdupq_n_u8(kMiddle);
    dot_group<false>(tile, weights.in, 0, weights.in, middle, sums);
    for (size_t r = 0; r < kRows; ++r) {
        const float zero = static_cast<const float*>(weights.zero)[rows[r]];
        const float scale = static_cast<const float*>(weights.scale)[rows[r]];
        for (size_t t = 0; t < kTokens; ++t)
            y[r * kTokens + t] = scale * (vaddvq_f32(sums[r][t]) - (zero - kMiddle) * tile.input[t]->sum);
    }
}

template <size_t kRows, size_t kTokens>
INLINE void dot_u4(const RowWeights& weights, const uint32_t* rows, const RowTile<kRows, kTokens>& tile, float* y) {
    float32x4_t totals[kRows][kTokens], sums[kRows][kTokens];
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) totals[r][t] = vdupq_n_f32(0.0f);
    for (size_t g = 0; g < weights.groups(); ++g) {
        uint8x16_t middle[kRows];
        for (size_t r = 0; r < kRows; ++r)
            middle[r] = vdupq_n_u8(static_cast<const uint8_t*>(weights.zero)[rows[r] * weights.groups() + g]);
        dot_group<true>(tile, weights.in, g * weights.group, (g + 1) * weights.group, middle, sums);
        for (size_t r = 0; r < kRows; ++r) {
            const float scale = weights.group_scale(rows[r] * weights.groups() + g);
            for (size_t t = 0; t < kTokens; ++t) totals[r][t] = vfmaq_n_f32(totals[r][t], sums[r][t], scale);
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) y[r * kTokens + t] = vaddvq_f32(totals[r][t]);
}

template <bool kIsF16, size_t kRows, size_t kTokens>
INLINE void dot_halves(const RowWeights& weights, const RowTile<kRows, kTokens>& tile, float* y) {
    float32x4_t sums[kRows][kTokens];
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) sums[r][t] = vdupq_n_f32(0.0f);
    for (size_t k = 0; k < weights.in; k += 4) {
        tile.fetch(2 * k);
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) {
            const float32x4_t w = load_half<kIsF16>(reinterpret_cast<const uint16_t*>(tile.row[r]) + k);
#pragma GCC unroll 4
            for (size_t t = 0; t < kTokens; ++t)
                sums[r][t] = vfmaq_f32(sums[r][t], w, vld1q_f32(tile.input[t]->value + k));
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) y[r * kTokens + t] = vaddvq_f32(sums[r][t]);
}

struct Dots {
    template <size_t kRows, size_t kTokens>
    DOTPROD static void run(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched,
                           const RowInput* const* inputs, float* y) {
        const RowTile<kRows, kTokens> tile(weights, rows, fetched, inputs);
        switch (weights.type) {
            case WeightType::u8: return dot_u8(weights, rows, tile, y);
            case WeightType::u4: return dot_u4(weights, rows, tile, y);
            case WeightType::f16: return dot_halves<true>(weights, tile, y);
            case WeightType::bf16: return dot_halves<false>(weights, tile, y);
        }
    }
};

}  // namespace

void dot_rows_neon(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched, const RowInput& input,
                   float* y) {
    run_rows<Dots>(weights, rows, fetched, input, y);
}

void dot_row_neon(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* const* inputs,
                  size_t count, float* y) {
    run_row<Dots>(weights, row, fetched, inputs, count, y);
}

}  // namespace actsparse
#endif

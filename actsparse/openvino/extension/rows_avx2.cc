// Dot products of rows for AVX2: weights less their middle as 16-bit integers, 16 at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "row_tile.hpp"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

// 16 weights, which begin at a multiple of 16.
template <bool kIsU4>
INLINE __m256i load_weights(const uint8_t* row, size_t k) {
    if (!kIsU4) return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k)));
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k / 64 * 32 + k % 32));
    const __m128i nibbles = k % 64 < 32 ? both : _mm_srli_epi16(both, 4);
    return _mm256_cvtepu8_epi16(_mm_and_si128(nibbles, _mm_set1_epi8(15)));
}

// sums[r][t] = the products of the channels [begin, end), as if weights were w - middle[r].
template <bool kIsU4, size_t kRows, size_t kTokens>
INLINE void dot_group(const RowTile<kRows, kTokens>& tile, size_t in, size_t begin, size_t end, const int (&middle)[kRows],
                      __m256 (&sums)[kRows][kTokens]) {
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) sums[r][t] = _mm256_setzero_ps();
    for (size_t k = begin; k < end; k += kSegmentRows) {
        tile.fetch(kIsU4 ? k / 2 : k);
        for (size_t r = 0; r < kRows; ++r) {
            const __m256i middles = _mm256_set1_epi16(static_cast<short>(middle[r]));
            const __m256i low = _mm256_sub_epi16(load_weights<kIsU4>(tile.row[r], k), middles);
            const __m256i high = _mm256_sub_epi16(load_weights<kIsU4>(tile.row[r], k + 16), middles);
            for (size_t t = 0; t < kTokens; ++t) {
                const RowInput& x = *tile.input[t];
                for (size_t term = 0; term < x.terms; ++term) {
                    const auto* q = reinterpret_cast<const __m128i*>(x.quantized + term * in + k);
                    const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(q));
                    const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1));
                    const __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(low, a), _mm256_madd_epi16(high, b));
                    const __m256 scale = _mm256_set1_ps(x.scale[(term * in + k) / kSegmentRows]);
                    sums[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, sums[r][t]);
                }
            }
        }
    }
}

INLINE float sum_lanes(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <size_t kRows, size_t kTokens>
INLINE void dot_u8(const RowWeights& weights, const uint32_t* rows, const RowTile<kRows, kTokens>& tile, float* y) {
    __m256 sums[kRows][kTokens];
    int middle[kRows];
    for (size_t r = 0; r < kRows; ++r) middle[r] = kMiddle;
    dot_group<false>(tile, weights.in, 0, weights.in, middle, sums);
    for (size_t r = 0; r < kRows; ++r) {
        const float zero = static_cast<const float*>(weights.zero)[rows[r]];
        const float scale = static_cast<const float*>(weights.scale)[rows[r]];
        for (size_t t = 0; t < kTokens; ++t)
            y[r * kTokens + t] = scale * (sum_lanes(sums[r][t]) - (zero - kMiddle) * tile.input[t]->sum);
    }
}

template <size_t kRows, size_t kTokens>
INLINE void dot_u4(const RowWeights& weights, const uint32_t* rows, const RowTile<kRows, kTokens>& tile, float* y) {
    __m256 totals[kRows][kTokens], sums[kRows][kTokens];
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) totals[r][t] = _mm256_setzero_ps();
    for (size_t g = 0; g < weights.groups(); ++g) {
        int middle[kRows];
        for (size_t r = 0; r < kRows; ++r)
            middle[r] = static_cast<const uint8_t*>(weights.zero)[rows[r] * weights.groups() + g];
        dot_group<true>(tile, weights.in, g * weights.group, (g + 1) * weights.group, middle, sums);
        for (size_t r = 0; r < kRows; ++r) {
            const size_t index = rows[r] * weights.groups() + g;
            const float scale = weights.is_scale_f16 ? _cvtsh_ss(static_cast<const uint16_t*>(weights.scale)[index])
                                                     : static_cast<const float*>(weights.scale)[index];
            for (size_t t = 0; t < kTokens; ++t)
                totals[r][t] = _mm256_fmadd_ps(sums[r][t], _mm256_set1_ps(scale), totals[r][t]);
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) y[r * kTokens + t] = sum_lanes(totals[r][t]);
}

template <bool kIsF16, size_t kRows, size_t kTokens>
INLINE void dot_halves(const RowWeights& weights, const RowTile<kRows, kTokens>& tile, float* y) {
    __m256 sums[kRows][kTokens];
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) sums[r][t] = _mm256_setzero_ps();
    for (size_t k = 0; k < weights.in; k += 8) {
        tile.fetch(2 * k);
        for (size_t r = 0; r < kRows; ++r) {
            const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.row[r] + 2 * k));
            const __m256 w = kIsF16 ? _mm256_cvtph_ps(bits)
                                    : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
            for (size_t t = 0; t < kTokens; ++t)
                sums[r][t] = _mm256_fmadd_ps(w, _mm256_loadu_ps(tile.input[t]->value + k), sums[r][t]);
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) y[r * kTokens + t] = sum_lanes(sums[r][t]);
}

struct Dots {
    template <size_t kRows, size_t kTokens>
    TARGET static void run(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched,
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

void dot_rows_avx2(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched, const RowInput& input,
                   float* y) {
    run_rows<Dots>(weights, rows, fetched, input, y);
}

void dot_row_avx2(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* const* inputs,
                  size_t count, float* y) {
    run_row<Dots>(weights, row, fetched, inputs, count, y);
}

}  // namespace actsparse
#endif

// Dot products of rows for AVX-512 with VNNI: 64 weights at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "avx512.hpp"
#include "row_tile.hpp"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

template <bool kIsU4>
INLINE __m512i load_row_weights(const uint8_t* row, size_t k) {
    return kIsU4 ? load_row_nibbles(row + k / 2) : _mm512_loadu_si512(row + k);
}

// The scales of 64 activations, for the sums of four each.
INLINE __m512 load_scale(const float* scale) {
    return _mm512_mask_broadcastss_ps(_mm512_set1_ps(scale[0]), 0xff00, _mm_load_ss(scale + 1));
}

// sums[r][t] += the products of the channels [begin, end), as if weights were w, or w - kMiddle with a start.
template <bool kIsU4, bool kHasStart, size_t kTerms, size_t kRows, size_t kTokens>
INLINE void add_products(const RowTile<kRows, kTokens>& tile, size_t in, size_t begin, size_t end,
                         __m512 (&sums)[kRows][kTokens]) {
    for (size_t k = begin; k < end; k += 64) {
        tile.fetch(kIsU4 ? k / 2 : k);
        __m512i w[kRows];
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) w[r] = load_row_weights<kIsU4>(tile.row[r], k);
#pragma GCC unroll 4
        for (size_t t = 0; t < kTokens; ++t) {
#pragma GCC unroll 3
            for (size_t term = 0; term < kTerms; ++term) {
                const size_t at = term * in + k;
                const RowInput& x = *tile.input[t];
                const __m512i start = kHasStart ? _mm512_loadu_si512(x.start + at / 4) : _mm512_setzero_si512();
                const __m512i quantized = _mm512_loadu_si512(x.quantized + at);
                const __m512 scale = load_scale(x.scale + at / kSegmentRows);
#pragma GCC unroll 8
                for (size_t r = 0; r < kRows; ++r) {
                    const __m512i dot = _mm512_dpbusd_epi32(start, w[r], quantized);
                    sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, sums[r][t]);
                }
            }
        }
    }
}

// sums[r][t] = the products of the channels [begin, end).
template <bool kIsU4, size_t kRows, size_t kTokens>
INLINE void dot_group(const RowTile<kRows, kTokens>& tile, size_t in, size_t begin, size_t end,
                      __m512 (&sums)[kRows][kTokens]) {
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_ps();
    if (tile.input[0]->terms == 1)
        add_products<kIsU4, false, 1>(tile, in, begin, end, sums);
    else
        add_products<kIsU4, !kIsU4, kExactTerms>(tile, in, begin, end, sums);
}

template <size_t kRows, size_t kTokens>
INLINE void dot_u8(const RowWeights& weights, const uint32_t* rows, const RowTile<kRows, kTokens>& tile, float* y) {
    __m512 sums[kRows][kTokens];
    dot_group<false>(tile, weights.in, 0, weights.in, sums);
    for (size_t r = 0; r < kRows; ++r) {
        const float zero = static_cast<const float*>(weights.zero)[rows[r]];
        const float scale = static_cast<const float*>(weights.scale)[rows[r]];
        for (size_t t = 0; t < kTokens; ++t) {
            const float middle = tile.input[t]->start ? kMiddle : 0;
            y[r * kTokens + t] = scale * (_mm512_reduce_add_ps(sums[r][t]) - (zero - middle) * tile.input[t]->sum);
        }
    }
}

template <size_t kRows, size_t kTokens>
INLINE void dot_u4(const RowWeights& weights, const uint32_t* rows, const RowTile<kRows, kTokens>& tile, float* y) {
    __m512 totals[kRows][kTokens], sums[kRows][kTokens];
    float corrections[kRows][kTokens] = {};
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) totals[r][t] = _mm512_setzero_ps();
    for (size_t g = 0; g < weights.groups(); ++g) {
        const size_t begin = g * weights.group, end = begin + weights.group;
        dot_group<true>(tile, weights.in, begin, end, sums);
        for (size_t r = 0; r < kRows; ++r) {
            const size_t index = rows[r] * weights.groups() + g;
            const float scale = weights.is_scale_f16 ? _cvtsh_ss(static_cast<const uint16_t*>(weights.scale)[index])
                                                     : static_cast<const float*>(weights.scale)[index];
            const float zero = scale * static_cast<const uint8_t*>(weights.zero)[index];
            for (size_t t = 0; t < kTokens; ++t) {
                totals[r][t] = _mm512_fmadd_ps(sums[r][t], _mm512_set1_ps(scale), totals[r][t]);
                for (size_t line = begin / kRowLine; line < end / kRowLine; ++line)
                    corrections[r][t] += zero * tile.input[t]->line_sum[line];
            }
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) y[r * kTokens + t] = _mm512_reduce_add_ps(totals[r][t]) - corrections[r][t];
}

template <bool kIsF16, size_t kRows, size_t kTokens>
INLINE void dot_halves(const RowWeights& weights, const RowTile<kRows, kTokens>& tile, float* y) {
    __m512 sums[kRows][kTokens];
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) sums[r][t] = _mm512_setzero_ps();
    for (size_t k = 0; k < weights.in; k += 16) {
        tile.fetch(2 * k);
        __m512 w[kRows];
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile.row[r] + 2 * k));
            w[r] = kIsF16 ? _mm512_cvtph_ps(bits)
                          : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
#pragma GCC unroll 4
        for (size_t t = 0; t < kTokens; ++t) {
            const __m512 x = _mm512_loadu_ps(tile.input[t]->value + k);
#pragma GCC unroll 8
            for (size_t r = 0; r < kRows; ++r) sums[r][t] = _mm512_fmadd_ps(w[r], x, sums[r][t]);
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        for (size_t t = 0; t < kTokens; ++t) y[r * kTokens + t] = _mm512_reduce_add_ps(sums[r][t]);
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

void dot_rows_avx512(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched, const RowInput& input,
                   float* y) {
    run_rows<Dots>(weights, rows, fetched, input, y);
}

void dot_row_avx512(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* const* inputs,
                  size_t count, float* y) {
    run_row<Dots>(weights, row, fetched, inputs, count, y);
}

}  // namespace actsparse
#endif

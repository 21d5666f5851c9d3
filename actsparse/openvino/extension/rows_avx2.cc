// A row's dot product for AVX2: weights less their middle as 16-bit integers, 16 at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.hpp"

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

// The channels [begin, end) of all terms, as if weights were w - middle.
template <bool kIsU4>
INLINE __m256 dot_group(const uint8_t* row, size_t in, size_t begin, size_t end, int middle, const RowInput& x) {
    __m256 sums = _mm256_setzero_ps();
    const __m256i middles = _mm256_set1_epi16(static_cast<short>(middle));
    for (size_t term = 0; term < x.terms; ++term) {
        const int8_t* q = x.quantized + term * in;
        const float* scale = x.lane_scale + term * in / 4;
        for (size_t k = begin; k < end; k += kSegmentRows) {
            __m256i dot = _mm256_setzero_si256();
            for (size_t i = k; i < k + kSegmentRows; i += 16) {
                const __m256i w = _mm256_sub_epi16(load_weights<kIsU4>(row, i), middles);
                const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
                dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w, a));
            }
            sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale[k / 4]), sums);
        }
    }
    return sums;
}

template <bool kIsF16>
TARGET __m256 dot_halves(const uint16_t* row, size_t in, const float* x) {
    __m256 sums = _mm256_setzero_ps();
    for (size_t k = 0; k < in; k += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k));
        const __m256 w = kIsF16 ? _mm256_cvtph_ps(half)
                                : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        sums = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + k), sums);
    }
    return sums;
}

TARGET float sum_lanes(__m256 v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

TARGET float dot_row_avx2(const RowWeights& weights, size_t j, const RowInput& x) {
    const uint8_t* row = weights.row(j);
    const auto* halves = reinterpret_cast<const uint16_t*>(row);
    if (weights.type == WeightType::f16) return sum_lanes(dot_halves<true>(halves, weights.in, x.value));
    if (weights.type == WeightType::bf16) return sum_lanes(dot_halves<false>(halves, weights.in, x.value));
    if (weights.type == WeightType::u8)
        return sum_lanes(dot_group<false>(row, weights.in, 0, weights.in, kMiddle, x));
    const size_t groups = weights.in / weights.group;
    __m256 total = _mm256_setzero_ps();
    for (size_t g = 0; g < groups; ++g) {
        const size_t index = j * groups + g;
        const float scale = weights.is_scale_f16 ? _cvtsh_ss(static_cast<const uint16_t*>(weights.scale)[index])
                                                 : static_cast<const float*>(weights.scale)[index];
        const __m256 sums = dot_group<true>(row, weights.in, g * weights.group, (g + 1) * weights.group,
                                            static_cast<const uint8_t*>(weights.zero)[index], x);
        total = _mm256_fmadd_ps(sums, _mm256_set1_ps(scale), total);
    }
    return sum_lanes(total);
}

}  // namespace actsparse
#endif

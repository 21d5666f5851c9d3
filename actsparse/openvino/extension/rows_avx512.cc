// A row's dot product for AVX-512 with VNNI: 64 weights at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#include "rows.hpp"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {


template <bool kIsU4>
INLINE __m512i load_weights(const uint8_t* row, size_t k) {
    if (!kIsU4) return _mm512_loadu_si512(row + k);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k / 2));
    const __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    return _mm512_and_si512(wide, _mm512_set1_epi8(15));
}

// The channels [begin, end) of all terms, as if weights were w - middle.
template <bool kIsU4>
INLINE __m512 dot_group(const uint8_t* row, size_t in, size_t begin, size_t end, int middle, const RowInput& x) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512i middles = _mm512_set1_epi32(middle);
    for (size_t term = 0; term < x.terms; ++term) {
        const int8_t* q = x.quantized + term * in;
        const float* scale = x.lane_scale + term * in / 4;
        const int32_t* sum = x.lane_sum + term * in / 4;
        for (size_t k = begin, i = 0; k < end; k += 64, ++i) {
            const __m512i w = load_weights<kIsU4>(row, k);
            __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, _mm512_loadu_si512(q + k));
            dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(middles, _mm512_loadu_si512(sum + k / 4)));
            sums[i % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_loadu_ps(scale + k / 4), sums[i % 2]);
        }
    }
    return _mm512_add_ps(sums[0], sums[1]);
}

template <bool kIsF16>
TARGET float dot_halves(const uint16_t* row, size_t in, const float* x) {
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t k = 0; k < in; k += 16) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k));
        const __m512 w = kIsF16 ? _mm512_cvtph_ps(half)
                                : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        sums[k / 16 % 2] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + k), sums[k / 16 % 2]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}


}  // namespace

TARGET float dot_row_avx512(const RowWeights& weights, size_t j, const RowInput& x) {
    const uint8_t* row = weights.row(j);
    if (weights.type == WeightType::f16) return dot_halves<true>(reinterpret_cast<const uint16_t*>(row), weights.in, x.value);
    if (weights.type == WeightType::bf16) return dot_halves<false>(reinterpret_cast<const uint16_t*>(row), weights.in, x.value);
    if (weights.type == WeightType::u8)
        return _mm512_reduce_add_ps(dot_group<false>(row, weights.in, 0, weights.in, kMiddle, x));
    const size_t groups = weights.in / weights.group;
    __m512 total = _mm512_setzero_ps();
    for (size_t g = 0; g < groups; ++g) {
        const size_t index = j * groups + g;
        const float scale = weights.is_scale_f16 ? _cvtsh_ss(static_cast<const uint16_t*>(weights.scale)[index])
                                                 : static_cast<const float*>(weights.scale)[index];
        const __m512 sums = dot_group<true>(row, weights.in, g * weights.group, (g + 1) * weights.group,
                                            static_cast<const uint8_t*>(weights.zero)[index], x);
        total = _mm512_fmadd_ps(sums, _mm512_set1_ps(scale), total);
    }
    return _mm512_reduce_add_ps(total);
}

}  // namespace actsparse
#endif

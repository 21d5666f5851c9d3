// What the kernels for AVX-512 and those for AMX do alike with weights.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define AVX512_INLINE \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"), always_inline)) inline

namespace actsparse {

// Load 64 bytes of u8 weights, or half the nibbles of 64 bytes of u4 weights.
template <bool kIsU4>
AVX512_INLINE __m512i load_weights(const uint8_t* line, bool is_high) {
    const __m512i bytes = _mm512_loadu_si512(line);
    if (!kIsU4) return bytes;
    return _mm512_and_si512(is_high ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
}

// Load 64 u4 weights of a row that is kept by itself: see rows.hpp.
AVX512_INLINE __m512i load_row_nibbles(const uint8_t* from) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
    return _mm512_and_si512(wide, _mm512_set1_epi8(15));
}

// Load 16 scales of u4 weights.
template <bool kIsF16>
AVX512_INLINE __m512 load_scale(const void* scale, size_t index) {
    if (kIsF16)
        return _mm512_cvtph_ps(_mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(scale) + index)));
    return _mm512_loadu_ps(static_cast<const float*>(scale) + index);
}

// Interleave four rows byte by byte: out[v] holds outputs [16 v, 16 v + 16) of a line, four bytes each.
AVX512_INLINE void interleave(__m512i a0, __m512i a1, __m512i a2, __m512i a3, __m512i out[4]) {
    const __m512i l01 = _mm512_unpacklo_epi8(a0, a1), h01 = _mm512_unpackhi_epi8(a0, a1);
    const __m512i l23 = _mm512_unpacklo_epi8(a2, a3), h23 = _mm512_unpackhi_epi8(a2, a3);
    out[0] = _mm512_unpacklo_epi16(l01, l23);
    out[1] = _mm512_unpackhi_epi16(l01, l23);
    out[2] = _mm512_unpacklo_epi16(h01, h23);
    out[3] = _mm512_unpackhi_epi16(h01, h23);
}

}  // namespace actsparse

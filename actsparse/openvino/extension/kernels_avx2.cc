// Kernels for AVX2: pairs of kept rows are widened to 16 bits and multiplied by vpmaddwd. (vpmaddubsw would saturate:
// 255 * 127 * 2 does not fit 16 bits.)
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "rows.hpp"
#include "segments.hpp"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

constexpr size_t kMaxWidth = outputs_per_bytes(WeightType::u4, kPageBytes);

// Two activations as 16-bit integers, for the two rows of a pair.
INLINE __m256i broadcast2(const int8_t* quantized) {
    const uint32_t low = static_cast<uint16_t>(quantized[0]), high = static_cast<uint16_t>(quantized[1]);
    return _mm256_set1_epi32(static_cast<int>(low | high << 16));
}

// 32 bytes of u8 weights, or half the nibbles of 32 bytes of u4 weights.
template <bool kIsU4>
INLINE __m256i load_weights(const uint8_t* line, bool is_high) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
    if (!kIsU4) return bytes;
    return _mm256_and_si256(is_high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

// The 32 bytes at `byte` of a line are outputs 16 v + 8 (byte / 32) + [0, 8) for v = 0 … 3: see Weights.
INLINE size_t output_of(size_t byte, size_t v) { return byte / 64 * 64 + 16 * v + byte / 32 % 2 * 8; }

template <bool kIsF16>
INLINE __m256 load_scale(const void* scale, size_t index) {
    if (kIsF16)
        return _mm256_cvtph_ps(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(scale) + index)));
    return _mm256_loadu_ps(static_cast<const float*>(scale) + index);
}

// The passes [first, last) of one segment.
template <bool kIsU4, bool kIsF16>
TARGET void multiply_segment(const Weights& weights, size_t panel, const uint32_t* row, const int8_t* quantized,
                             size_t passes, float scale, int32_t sum, size_t group, size_t begin, size_t end,
                             float* acc) {
    const uint8_t* data = weights.panel_data(panel);
    const size_t row_bytes = weights.row_bytes(panel);
    alignas(32) int32_t dots[kMaxWidth];
    std::memset(dots, 0, (end - begin) * sizeof(int32_t));
    constexpr size_t kHalves = kIsU4 ? 2 : 1;
    const size_t byte_begin = begin / kHalves, byte_end = end / kHalves;
    const __m256i zero = _mm256_setzero_si256();
    for (size_t pass = 0; pass < passes; ++pass, row += kPassRows, quantized += kPassRows) {
        const uint8_t *current[kPassRows], *next[kPassRows];
        __m256i x[kPassRows / 2];
        for (size_t i = 0; i < kPassRows; ++i) {
            current[i] = data + row[i] * row_bytes;
            next[i] = data + row[kPrefetchPasses * kPassRows + i] * row_bytes;
        }
        for (size_t i = 0; i < kPassRows / 2; ++i) x[i] = broadcast2(quantized + 2 * i);
        for (size_t byte = byte_begin; byte < byte_end; byte += 32) {
            if (byte % 64 == 0)
                for (size_t i = 0; i < kPassRows; ++i)
                    _mm_prefetch(reinterpret_cast<const char*>(next[i] + byte), _MM_HINT_T1);
#pragma GCC unroll 2
            for (size_t half = 0; half < kHalves; ++half) {
                const size_t line = (byte / 64 * kHalves + half) * 64 + byte % 64;
                int32_t* d[4];
                __m256i dot[4];
                for (size_t v = 0; v < 4; ++v) {
                    d[v] = dots + output_of(line, v) - begin;
                    dot[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(d[v]));
                }
#pragma GCC unroll 4
                for (size_t i = 0; i < kPassRows / 2; ++i) {
                    const __m256i a = load_weights<kIsU4>(current[2 * i] + byte, half);
                    const __m256i b = load_weights<kIsU4>(current[2 * i + 1] + byte, half);
                    const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
                    const __m256i w[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                                          _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
                    // low holds pairs (a, b) of bytes 0 … 7 of each 128 bits: widened, four pairs make four outputs.
                    for (size_t v = 0; v < 4; ++v)
                        dot[v] = _mm256_add_epi32(dot[v], _mm256_madd_epi16(w[v], x[i]));
                }
                for (size_t v = 0; v < 4; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(d[v]), dot[v]);
            }
        }
    }
    const size_t index = group * weights.out + panel * weights.panel_outputs() + begin;
    for (size_t o = 0; o < end - begin; o += 8) {
        __m256i dot = _mm256_load_si256(reinterpret_cast<const __m256i*>(dots + o));
        __m256 factor = _mm256_set1_ps(scale);
        if (kIsU4) {
            const __m256i zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(
                reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(weights.zero) + index + o)));
            dot = _mm256_sub_epi32(dot, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(sum)));
            factor = _mm256_mul_ps(factor, load_scale<kIsF16>(weights.scale, index + o));
        } else {
            dot = _mm256_sub_epi32(dot, _mm256_set1_epi32(kMiddle * sum));
        }
        _mm256_storeu_ps(acc + o, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, _mm256_loadu_ps(acc + o)));
    }
}

template <bool kIsF16>
INLINE __m256 widen(__m128i half) {
    return kIsF16 ? _mm256_cvtph_ps(half)
                  : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

template <bool kIsF16>
TARGET void multiply_half(const Weights& weights, size_t panel, const uint32_t* row, const float* value, size_t passes,
                          size_t begin, size_t end, float* acc) {
    const uint8_t* data = weights.panel_data(panel);
    const size_t row_bytes = weights.row_bytes(panel);
    for (size_t pass = 0; pass < passes; ++pass, row += kPassRows, value += kPassRows)
        for (size_t o = begin; o < end; o += 16) {
            __m256 a0 = _mm256_loadu_ps(acc + o - begin), a1 = _mm256_loadu_ps(acc + o - begin + 8);
            for (size_t i = 0; i < kPassRows; ++i) {
                if (o % 32 == 0)
                    _mm_prefetch(reinterpret_cast<const char*>(data + row[kPrefetchPasses * kPassRows + i] * row_bytes + 2 * o),
                                 _MM_HINT_T1);
                const auto* w = reinterpret_cast<const __m128i*>(data + row[i] * row_bytes + 2 * o);
                const __m128i h0 = _mm_loadu_si128(w), h1 = _mm_loadu_si128(w + 1);
                const __m256 x = _mm256_set1_ps(value[i]);
                a0 = _mm256_fmadd_ps(x, widen<kIsF16>(h0), a0);
                a1 = _mm256_fmadd_ps(x, widen<kIsF16>(h1), a1);
            }
            _mm256_storeu_ps(acc + o - begin, a0);
            _mm256_storeu_ps(acc + o - begin + 8, a1);
        }
}

// The products of passes [first, last), which lie in segment s, for outputs [begin, end) of a panel.
TARGET void multiply_part(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                          size_t token, size_t s, size_t first, size_t last, float* acc) {
    const uint32_t* row = kept.row.data() + first * kPassRows;
    const size_t passes = last - first, offset = token * kept.length() + first * kPassRows;
    if (weights.type == WeightType::f16)
        return multiply_half<true>(weights, panel, row, kept.value.data() + offset, passes, begin, end, acc);
    if (weights.type == WeightType::bf16)
        return multiply_half<false>(weights, panel, row, kept.value.data() + offset, passes, begin, end, acc);
    const float scale = kept.scale[token * kept.segments.size() + s];
    int32_t sum = 0;
    for (size_t pass = first; pass < last; ++pass) sum += kept.pass_sum[token * kept.passes + pass];
    const auto run = weights.type == WeightType::u8 ? multiply_segment<false, false>
                     : weights.is_scale_f16         ? multiply_segment<true, true>
                                                    : multiply_segment<true, false>;
    run(weights, panel, row, kept.quantized.data() + offset, passes, scale, sum, kept.segments[s].group, begin, end,
        acc);
}

}  // namespace

// Listing and quantising channels in plain C++ is a small part of the work.
const Kernels avx2_kernels{
    "avx2", portable_kernels.compact, portable_kernels.quantize, multiply_by_segments<multiply_part>,
    multiply_tokens_by_segments<multiply_part>, dot_rows_avx2, dot_row_avx2};

}  // namespace actsparse
#endif

// Kernels for ARM with the dot product instruction: four kept rows are interleaved byte by byte and multiplied by it
// (signed weights, signed activations).
#include "kernels.hpp"

#if defined(ACTSPARSE_NEON)
#include <cmath>
#include <limits>

#include "neon.hpp"
#include "rows.hpp"
#include "segments.hpp"

namespace actsparse {
namespace {

constexpr size_t kMaxWidth = outputs_per_bytes(WeightType::u4, kPageBytes);

// Listing channels in plain C++ is a small part of the work. A function of its own makes the table a constant, which the
// one for I8MM can take from before any code has run.
size_t compact(const float* x, const float* threshold, size_t begin, size_t end, uint32_t* row, float* value) {
    return portable_kernels.compact(x, threshold, begin, end, row, value);
}

void quantize(const float* value, size_t n, int8_t* quantized, float* scale, int32_t* pass_sum, float* rest) {
    float32x4_t most = vdupq_n_f32(0.0f);
    for (size_t k = 0; k < n; k += 4) most = vmaxq_f32(most, vabsq_f32(vld1q_f32(value + k)));
    const float largest = vmaxvq_f32(most);  // NaN if any is
    const bool is_finite = std::isfinite(largest);
    *scale = is_finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
    // The reciprocal of a denormal scale overflows: such values are as good as 0. So are all that are not finite: NaN
    // becomes the integer 0.
    const float inverse = is_finite && largest > 1e-30f ? 127.0f / largest : 0.0f;
    for (size_t k = 0; k < n; k += kPassRows) {
        const float32x4_t low = vld1q_f32(value + k), high = vld1q_f32(value + k + 4);
        const int32x4_t q_low = vcvtnq_s32_f32(vmulq_n_f32(low, inverse));
        const int32x4_t q_high = vcvtnq_s32_f32(vmulq_n_f32(high, inverse));
        const int16x8_t q = vcombine_s16(vmovn_s32(q_low), vmovn_s32(q_high));
        vst1_s8(quantized + k, vmovn_s16(q));
        pass_sum[k / kPassRows] = vaddvq_s16(q);
        if (rest) {
            vst1q_f32(rest + k, vfmsq_f32(low, vdupq_n_f32(*scale), vcvtq_f32_s32(q_low)));
            vst1q_f32(rest + k + 4, vfmsq_f32(high, vdupq_n_f32(*scale), vcvtq_f32_s32(q_high)));
        }
    }
}

// Four bytes of activations, for the four rows that interleave() joins.
ALWAYS_INLINE int8x16_t broadcast4(const int8_t* quantized) {
    int32_t four;
    std::memcpy(&four, quantized, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// The passes [first, last) of segment s. The sums stay in the first-level cache between them.
template <bool kIsU4>
DOTPROD void multiply_segment(const Weights& weights, size_t panel, const KeptRows& kept, size_t token, size_t s,
                             size_t first, size_t last, float* acc) {
    constexpr size_t kHalves = kIsU4 ? 2 : 1;
    const uint8_t* data = weights.panel_data(panel);
    const size_t row_bytes = weights.row_bytes(panel), width = weights.width(panel);
    alignas(kLineBytes) int32_t dots[kMaxWidth];
    std::memset(dots, 0, width * sizeof *dots);
    int32_t sum = 0;
    for (size_t pass = first; pass < last; ++pass) {
        sum += kept.pass_sum[token * kept.passes + pass];
        const uint32_t* row = kept.row.data() + pass * kPassRows;
        const int8_t* quantized = kept.quantized.data() + token * kept.length() + pass * kPassRows;
        const uint8_t *current[kPassRows], *next[kPassRows];
        for (size_t i = 0; i < kPassRows; ++i) {
            current[i] = data + row[i] * row_bytes;
            next[i] = data + row[kPrefetchPasses * kPassRows + i] * row_bytes;
        }
        const int8x16_t x[2] = {broadcast4(quantized), broadcast4(quantized + 4)};
        for (size_t byte = 0; byte < row_bytes; byte += kColumnBytes) {
            if (byte % kLineBytes == 0)
                for (size_t i = 0; i < kPassRows; ++i) __builtin_prefetch(next[i] + byte, 0, 2);
#pragma GCC unroll 2
            for (size_t half = 0; half < kHalves; ++half) {
                int32_t* d = dots + output_of<kIsU4>(byte, half);
                int8x16_t a[4], b[4];
                interleave<kIsU4>(current, byte, half, a);
                interleave<kIsU4>(current + 4, byte, half, b);
#pragma GCC unroll 4
                for (size_t v = 0; v < 4; ++v)
                    vst1q_s32(d + 16 * v, vdotq_s32(vdotq_s32(vld1q_s32(d + 16 * v), a[v], x[0]), b[v], x[1]));
            }
        }
    }
    const float scale = kept.scale[token * kept.segments.size() + s];
    const size_t index = factor_index(weights, panel, kept.segments[s].group, 0);
    for (size_t o = 0; o < width; o += 4)
        add_dequantized<kIsU4>(weights, index + o, vld1q_s32(dots + o), scale, sum, acc + o);
}

// acc[t][16] += the products of some rows for kTokens tokens and 16 outputs.
template <bool kIsF16, size_t kTokens>
ALWAYS_INLINE void multiply_block_half(const uint8_t* data, size_t row_bytes, const uint32_t* row, size_t rows,
                                       const float* value, size_t length, float* acc, size_t width) {
    float32x4_t sums[kTokens][4];
#pragma GCC unroll 6
    for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; ++v) sums[t][v] = vld1q_f32(acc + t * width + 4 * v);
    for (size_t k = 0; k < rows; ++k) {
        const auto* from = reinterpret_cast<const uint16_t*>(data + row[k] * row_bytes);
        const float32x4_t w[4] = {load_half<kIsF16>(from), load_half<kIsF16>(from + 4), load_half<kIsF16>(from + 8),
                                  load_half<kIsF16>(from + 12)};
#pragma GCC unroll 6
        for (size_t t = 0; t < kTokens; ++t) {
            const float32x4_t x = vdupq_n_f32(value[t * length + k]);
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; ++v) sums[t][v] = vfmaq_f32(sums[t][v], w[v], x);
        }
    }
#pragma GCC unroll 6
    for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; ++v) vst1q_f32(acc + t * width + 4 * v, sums[t][v]);
}

template <bool kIsF16>
void multiply_half(const Weights& weights, size_t panel, const KeptRows& kept, size_t token, size_t first, size_t last,
                   float* acc) {
    const uint8_t* data = weights.panel_data(panel);
    const size_t row_bytes = weights.row_bytes(panel);
    for (size_t pass = first; pass < last; ++pass) {
        const uint32_t* row = kept.row.data() + pass * kPassRows;
        const float* value = kept.value.data() + token * kept.length() + pass * kPassRows;
        for (size_t byte = 0; byte < row_bytes; byte += 32) {
            if (byte % kLineBytes == 0)
                for (size_t i = 0; i < kPassRows; ++i)
                    __builtin_prefetch(data + row[kPrefetchPasses * kPassRows + i] * row_bytes + byte, 0, 2);
            multiply_block_half<kIsF16, 1>(data + byte, row_bytes, row, kPassRows, value, 0, acc + byte / 2, 0);
        }
    }
}

// The products of passes [first, last), which lie in segment s, of one token.
void multiply_part(const Weights& weights, size_t panel, size_t, size_t, const KeptRows& kept, size_t token, size_t s,
                   size_t first, size_t last, float* acc) {
    switch (weights.type) {
        case WeightType::u8: return multiply_segment<false>(weights, panel, kept, token, s, first, last, acc);
        case WeightType::u4: return multiply_segment<true>(weights, panel, kept, token, s, first, last, acc);
        case WeightType::f16: return multiply_half<true>(weights, panel, kept, token, first, last, acc);
        case WeightType::bf16: return multiply_half<false>(weights, panel, kept, token, first, last, acc);
    }
}

template <bool kIsF16, size_t kTokens>
__attribute__((noinline)) void run_half(const uint8_t* data, size_t row_bytes, const uint32_t* row, size_t rows,
                                        const float* value, size_t length, float* acc, size_t width) {
    multiply_block_half<kIsF16, kTokens>(data, row_bytes, row, rows, value, length, acc, width);
}

template <bool kIsF16>
void multiply_tokens_half(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                          size_t token_begin, size_t token_end, float* acc) {
    constexpr decltype(&run_half<kIsF16, 1>) kRun[kBlockTokens] = {run_half<kIsF16, 1>, run_half<kIsF16, 2>,
                                                                   run_half<kIsF16, 3>, run_half<kIsF16, 4>,
                                                                   run_half<kIsF16, 5>, run_half<kIsF16, 6>};
    constexpr size_t kBlockRows = 128;  // of a line: 8 KiB, read again for each block of tokens
    const uint8_t* data = weights.panel_data(panel) + 2 * begin;
    const size_t row_bytes = weights.row_bytes(panel), width = end - begin;
    for (size_t k = 0; k < kept.length(); k += kBlockRows) {
        const size_t rows = std::min(kBlockRows, kept.length() - k);
        for (size_t o = 0; o < width; o += 16)
            for (size_t token = token_begin; token < token_end; token += kBlockTokens)
                kRun[std::min(kBlockTokens, token_end - token) - 1](
                    data + 2 * o, row_bytes, kept.row.data() + k, rows,
                    kept.value.data() + token * kept.length() + k, kept.length(),
                    acc + (token - token_begin) * width + o, width);
    }
}

struct Dots {
    ALWAYS_INLINE static void join(int8x16_t*) {}

    template <bool kIsU4, size_t kTokens>
    DOTPROD static void run(const Block& b) {
        int32x4_t dot[kTokens][4];
#pragma GCC unroll 6
        for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; ++v) dot[t][v] = vdupq_n_s32(0);
        for (size_t k = 0; k < b.rows; k += 4) {
            const int8x16_t w[4] = {b.column[k], b.column[k + 1], b.column[k + 2], b.column[k + 3]};
#pragma GCC unroll 6
            for (size_t t = 0; t < kTokens; ++t) {
                const int8x16_t x = broadcast4(b.quantized + t * b.length + k);
#pragma GCC unroll 4
                for (size_t v = 0; v < 4; ++v) dot[t][v] = vdotq_s32(dot[t][v], w[v], x);
            }
        }
#pragma GCC unroll 6
        for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; ++v)
                add_dequantized<kIsU4>(b.weights, b.index + 16 * v, dot[t][v], b.scale[t * b.segments],
                                       b.sum[t * b.segments], b.acc + t * b.width + 16 * v);
    }
};

void multiply_tokens(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                     size_t token_begin, size_t token_end, float* acc) {
    const auto run = weights.type == WeightType::u8    ? multiply_tokens_integer<Dots, false>
                     : weights.type == WeightType::u4  ? multiply_tokens_integer<Dots, true>
                     : weights.type == WeightType::f16 ? multiply_tokens_half<true>
                                                       : multiply_tokens_half<false>;
    run(weights, panel, begin, end, kept, token_begin, token_end, acc);
}

}  // namespace

const Kernels neon_kernels{"neon", compact, quantize, multiply_by_segments<multiply_part>, multiply_tokens, dot_rows_neon,
                           dot_row_neon};

}  // namespace actsparse
#endif

// What the kernels for ARM with and without I8MM do alike. All of it runs on any 64-bit ARM processor.
#pragma once

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "fetcher.hpp"
#include "kept_rows.hpp"
#include "weights.hpp"

#define ALWAYS_INLINE inline __attribute__((always_inline))

// The instruction that a function may use beside those of any processor. Where all code may, an attribute would take
// others away.
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD
#else
#define DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define I8MM
#else
#define I8MM __attribute__((target("arch=armv8.2-a+i8mm")))
#endif

namespace actsparse {

// What is read of a row at a time: 16 outputs of u8 weights, 32 of u4.
constexpr size_t kColumnBytes = 16;
// Tokens that are multiplied at a time: times 4 vectors of sums, 4 of weights, 1 of activations: 29 of 32 registers.
constexpr size_t kBlockTokens = 6;

// 16 bytes of u8 weights, or half the nibbles of 16 bytes of u4 weights, less their middle, which makes them signed.
template <bool kIsU4>
ALWAYS_INLINE int8x16_t load_weights(const uint8_t* from, bool is_high, uint8x16_t middle) {
    uint8x16_t bytes = vld1q_u8(from);
    if (kIsU4) bytes = is_high ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
    return vreinterpretq_s8_u8(vsubq_u8(bytes, middle));
}

template <bool kIsF16>
ALWAYS_INLINE float32x4_t load_half(const uint16_t* weights) {
    const uint16x4_t half = vld1_u16(weights);
    return kIsF16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

// Interleave a column of four rows byte by byte: out[v] holds four outputs, four bytes each.
template <bool kIsU4>
ALWAYS_INLINE void interleave(const uint8_t* const* row, size_t byte, bool is_high, int8x16_t* out) {
    int8x16_t a[4];
    const uint8x16_t middle = vdupq_n_u8(kIsU4 ? 0 : kMiddle);  // zero points of u4 weights differ: see add_dequantized
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; ++i) a[i] = load_weights<kIsU4>(row[i] + byte, is_high, middle);
    const int16x8_t l01 = vreinterpretq_s16_s8(vzip1q_s8(a[0], a[1])), h01 = vreinterpretq_s16_s8(vzip2q_s8(a[0], a[1]));
    const int16x8_t l23 = vreinterpretq_s16_s8(vzip1q_s8(a[2], a[3])), h23 = vreinterpretq_s16_s8(vzip2q_s8(a[2], a[3]));
    out[0] = vreinterpretq_s8_s16(vzip1q_s16(l01, l23));
    out[1] = vreinterpretq_s8_s16(vzip2q_s16(l01, l23));
    out[2] = vreinterpretq_s8_s16(vzip1q_s16(h01, h23));
    out[3] = vreinterpretq_s8_s16(vzip2q_s16(h01, h23));
}

// The first output in the column at `byte`; those of out[v] begin 16 v further on: see Weights.
template <bool kIsU4>
ALWAYS_INLINE size_t output_of(size_t byte, bool is_high) {
    const size_t line = byte / kLineBytes * kLineBytes;
    return (kIsU4 ? 2 * line + (is_high ? kLineBytes : 0) : line) + byte % kLineBytes / 4;
}

// The place of an output's scale and zero point (u4).
ALWAYS_INLINE size_t factor_index(const Weights& weights, size_t panel, size_t group, size_t output) {
    return group * weights.out + panel * weights.panel_outputs() + output;
}

// acc[0..4) += what the integer sums of four outputs stand for; `scale` and `sum` belong to the activations, `index`
// says where the outputs' scales and zero points are (u4).
template <bool kIsU4>
ALWAYS_INLINE void add_dequantized(const Weights& weights, size_t index, int32x4_t dot, float scale, int32_t sum,
                                   float* acc) {
    float32x4_t factor = vdupq_n_f32(scale);
    if (kIsU4) {
        uint32_t four;
        std::memcpy(&four, static_cast<const uint8_t*>(weights.zero) + index, sizeof four);
        const uint16x4_t zero = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
        dot = vmlsq_n_s32(dot, vreinterpretq_s32_u32(vmovl_u16(zero)), sum);
        const float32x4_t scales = weights.is_scale_f16
                                       ? load_half<true>(static_cast<const uint16_t*>(weights.scale) + index)
                                       : vld1q_f32(static_cast<const float*>(weights.scale) + index);
        factor = vmulq_f32(factor, scales);
    }
    vst1q_f32(acc, vfmaq_f32(vld1q_f32(acc), vcvtq_f32_s32(dot), factor));
}

// A column of a segment's weights, and some tokens' activations.
struct Block {
    const Weights& weights;
    size_t index;              // of the first output's scale and zero point (u4)
    const int8x16_t* column;   // [rows / kPassRows][8]
    size_t rows;
    const int8_t* quantized;   // [tokens], `length` apart
    size_t length;
    const float* scale;        // [tokens], `segments` apart, as `sum`
    const int32_t* sum;
    size_t segments;
    float* acc;                // [tokens], `width` apart
    size_t width;
};

// Kernels::multiply_tokens for integer weights by means of Blocks::run<is u4, tokens>. Weights are interleaved once for
// all tokens: eight rows by Blocks::join after each four of them by interleave().
template <typename Blocks, bool kIsU4>
void multiply_tokens_integer(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                             size_t token_begin, size_t token_end, float* acc) {
    constexpr void (*kRun[kBlockTokens])(const Block&) = {
        Blocks::template run<kIsU4, 1>, Blocks::template run<kIsU4, 2>, Blocks::template run<kIsU4, 3>,
        Blocks::template run<kIsU4, 4>, Blocks::template run<kIsU4, 5>, Blocks::template run<kIsU4, 6>};
    int8x16_t column[kSharedSegmentRows];
    constexpr size_t kHalves = kIsU4 ? 2 : 1;
    const uint8_t* data = weights.panel_data(panel) + begin / kHalves;
    const size_t row_bytes = weights.row_bytes(panel), width = end - begin, bytes = width / kHalves;
    const size_t segments = kept.segments.size();
    for (size_t s = 0; s < segments; ++s) {
        const Segment& segment = kept.segments[s];
        const size_t first = segment.pass_begin * kPassRows, rows = segment.rows();
        const uint32_t* row = kept.row.data() + first;
        Fetcher fetcher(data, row_bytes, bytes, row + rows, s + 1 < segments ? kept.segments[s + 1].rows() : 0);
        for (size_t byte = 0; byte < bytes; byte += kColumnBytes)
            for (size_t half = 0; half < kHalves; ++half) {
                for (size_t k = 0; k < rows; k += kPassRows) {
                    const uint8_t* eight[kPassRows];
                    for (size_t i = 0; i < kPassRows; ++i) eight[i] = data + row[k + i] * row_bytes;
                    interleave<kIsU4>(eight, byte, half, column + k);
                    interleave<kIsU4>(eight + 4, byte, half, column + k + 4);
                    Blocks::join(column + k);
                    fetcher.fetch();
                    fetcher.fetch();
                }
                const size_t output = output_of<kIsU4>(byte, half);
                const size_t index = factor_index(weights, panel, segment.group, begin + output);
                for (size_t token = token_begin; token < token_end; token += kBlockTokens)
                    kRun[std::min(kBlockTokens, token_end - token) - 1](
                        {weights, index, column, rows, kept.quantized.data() + token * kept.length() + first,
                         kept.length(), kept.scale.data() + token * segments + s,
                         kept.segment_sum.data() + token * segments + s, segments,
                         acc + (token - token_begin) * width + output, width});
            }
    }
}

}  // namespace actsparse

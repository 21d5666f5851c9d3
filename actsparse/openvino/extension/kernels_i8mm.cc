// Kernels for ARM with matrix products of INT8 (I8MM): for several tokens one instruction multiplies eight rows of two
// outputs by two tokens. For a single token nothing is gained.
#include "kernels.hpp"

#if defined(ACTSPARSE_NEON)
#include "neon.hpp"

namespace actsparse {
namespace {

struct Tiles {
    // From fours of bytes of two times four rows to eights, of two outputs in a vector.
    ALWAYS_INLINE static void join(int8x16_t* column) {
        int32x4_t a[4], b[4];
        for (size_t v = 0; v < 4; ++v) {
            a[v] = vreinterpretq_s32_s8(column[v]);
            b[v] = vreinterpretq_s32_s8(column[v + 4]);
        }
        for (size_t v = 0; v < 4; ++v) {
            column[2 * v] = vreinterpretq_s8_s32(vzip1q_s32(a[v], b[v]));
            column[2 * v + 1] = vreinterpretq_s8_s32(vzip2q_s32(a[v], b[v]));
        }
    }

    // An odd token is paired with itself.
    template <bool kIsU4, size_t kTokens>
    I8MM static void run(const Block& b) {
        constexpr size_t kPairs = (kTokens + 1) / 2;
        int32x4_t dot[kPairs][8];
#pragma GCC unroll 3
        for (size_t p = 0; p < kPairs; ++p)
#pragma GCC unroll 8
            for (size_t v = 0; v < 8; ++v) dot[p][v] = vdupq_n_s32(0);
        for (size_t k = 0; k < b.rows; k += kPassRows) {
            int8x16_t x[kPairs];
#pragma GCC unroll 3
            for (size_t p = 0; p < kPairs; ++p) {
                const int8_t* quantized = b.quantized + 2 * p * b.length + k;
                x[p] = vcombine_s8(vld1_s8(quantized), vld1_s8(quantized + (2 * p + 1 < kTokens ? b.length : 0)));
            }
#pragma GCC unroll 8
            for (size_t v = 0; v < 8; ++v) {
                const int8x16_t w = b.column[k + v];
#pragma GCC unroll 3
                for (size_t p = 0; p < kPairs; ++p) dot[p][v] = vmmlaq_s32(dot[p][v], x[p], w);
            }
        }
        // dot[p][v] holds two outputs of one token, then the same two of the other.
#pragma GCC unroll 6
        for (size_t t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
            for (size_t v = 0; v < 4; ++v) {
                const int64x2_t low = vreinterpretq_s64_s32(dot[t / 2][2 * v]);
                const int64x2_t high = vreinterpretq_s64_s32(dot[t / 2][2 * v + 1]);
                const int32x4_t four = vreinterpretq_s32_s64(t % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
                add_dequantized<kIsU4>(b.weights, b.index + 16 * v, four, b.scale[t * b.segments],
                                       b.sum[t * b.segments], b.acc + t * b.width + 16 * v);
            }
    }
};

void multiply_tokens(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                     size_t token_begin, size_t token_end, float* acc) {
    const auto run = weights.type == WeightType::u8   ? multiply_tokens_integer<Tiles, false>
                     : weights.type == WeightType::u4 ? multiply_tokens_integer<Tiles, true>
                                                      : neon_kernels.multiply_tokens;
    run(weights, panel, begin, end, kept, token_begin, token_end, acc);
}

}  // namespace

const Kernels i8mm_kernels{"i8mm", neon_kernels.compact, neon_kernels.quantize, neon_kernels.multiply,
                           multiply_tokens, neon_kernels.dot_rows, neon_kernels.dot_row};

}  // namespace actsparse
#endif

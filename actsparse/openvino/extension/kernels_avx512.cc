// Kernels for AVX-512 with VNNI: four kept rows are interleaved byte by byte and multiplied by one dot product
// instruction (unsigned weights, signed activations).
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "avx512.hpp"
#include "fetcher.hpp"
#include "kernels.hpp"
#include "rows.hpp"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

constexpr size_t kMaxWidth = outputs_per_bytes(WeightType::u4, kPageBytes);

TARGET size_t compact(const float* x, const float* threshold, size_t begin, size_t end, uint32_t* row, float* value) {
    size_t n = 0;
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(begin)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (size_t j = begin; j < end; j += 16) {
        const __mmask16 valid = end - j < 16 ? static_cast<__mmask16>((1u << (end - j)) - 1) : 0xffff;
        const __m512 v = _mm512_maskz_loadu_ps(valid, x + j);
        const __m512 t = _mm512_maskz_loadu_ps(valid, threshold + j);
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(v), t, _CMP_NLE_UQ);
        // Compressing into a register and storing all of it is far faster on some processors than compressing stores.
        _mm512_storeu_si512(row + n, _mm512_maskz_compress_epi32(kept, index));
        _mm512_storeu_ps(value + n, _mm512_maskz_compress_ps(kept, v));
        n += static_cast<size_t>(__builtin_popcount(kept));
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    return n;
}

TARGET void quantize(const float* value, size_t n, int8_t* quantized, float* scale, int32_t* pass_sum, float* rest) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 not_finite = 0;
    for (size_t k = 0; k < n; k += 16) {
        const __mmask16 valid = n - k < 16 ? static_cast<__mmask16>((1u << (n - k)) - 1) : 0xffff;
        const __m512 v = _mm512_maskz_loadu_ps(valid, value + k);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
        not_finite |= _mm512_fpclass_ps_mask(v, 0x99);  // NaN or infinite
    }
    const float m = _mm512_reduce_max_ps(largest);
    const float s = not_finite ? std::numeric_limits<float>::quiet_NaN() : m / 127.0f;
    const __m512 inverse = _mm512_set1_ps(!not_finite && m > 1e-30f ? 127.0f / m : 0.0f);
    *scale = s;
    for (size_t k = 0; k < n; k += 16) {
        const __mmask16 valid = n - k < 16 ? static_cast<__mmask16>((1u << (n - k)) - 1) : 0xffff;
        const __m512 v = _mm512_maskz_loadu_ps(not_finite ? 0 : valid, value + k);
        const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
        _mm_mask_storeu_epi8(quantized + k, valid, _mm512_cvtepi32_epi8(q));
        if (rest) {
            // One rounding: the rest of a rest is as exact as the first.
            const __m512 original = _mm512_maskz_loadu_ps(valid, value + k);
            _mm512_mask_storeu_ps(rest + k, valid,
                                  _mm512_fnmadd_ps(_mm512_set1_ps(s), _mm512_cvtepi32_ps(q), original));
        }
        const __m256i low = _mm512_castsi512_si256(q), high = _mm512_extracti64x4_epi64(q, 1);
        pass_sum[k / kPassRows] = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(low));
        if (n - k > kPassRows) pass_sum[k / kPassRows + 1] = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(high));
    }
}

// dot[i] += the dot product of four weights and four activations. Written in assembly: some compilers copy and spill the
// intrinsic's accumulator.
INLINE void add_products(__m512i& dot, __m512i weights, __m512i activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(weights), "v"(activations));
}

// Four bytes of activations, for the four rows that interleave() joins.
INLINE __m512i broadcast4(const int8_t* quantized) {
    int32_t four;
    std::memcpy(&four, quantized, sizeof four);
    return _mm512_set1_epi32(four);
}

// Scales and zero points of a u4 panel's outputs in one group.
struct GroupFactors {
    const void* scale;
    const uint8_t* zero;
};

template <bool kIsU4, bool kIsF16>
INLINE GroupFactors group_factors(const Weights& weights, size_t panel, size_t group) {
    if (!kIsU4) return {nullptr, nullptr};
    const size_t index = group * weights.out + panel * weights.panel_outputs();
    return {static_cast<const uint8_t*>(weights.scale) + index * (kIsF16 ? 2 : 4),
            static_cast<const uint8_t*>(weights.zero) + index};
}

// acc[0..16) += what the integer sums of 16 outputs stand for; `scale` and `sum` belong to the activations.
template <bool kIsU4, bool kIsF16>
INLINE void add_dequantized(__m512i dot, __m512 scale, __m512i sum, const GroupFactors& factors, size_t output,
                            float* acc) {
    if (kIsU4) {
        const __m512i zero = _mm512_cvtepu8_epi32(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(factors.zero + output)));
        dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(zero, sum));
        scale = _mm512_mul_ps(scale, load_scale<kIsF16>(factors.scale, output));
    } else {
        dot = _mm512_sub_epi32(dot, _mm512_mullo_epi32(_mm512_set1_epi32(kMiddle), sum));
    }
    _mm512_storeu_ps(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, _mm512_loadu_ps(acc)));
}

// Sums of 64 outputs. (In an array the compiler would keep them in memory.)
struct Sums {
    __m512i a, b, c, d;
};

INLINE Sums no_sums() {
    const __m512i none = _mm512_setzero_si512();
    return {none, none, none, none};
}

INLINE Sums load_sums(const int32_t* from) {
    return {_mm512_load_si512(from), _mm512_load_si512(from + 16), _mm512_load_si512(from + 32), _mm512_load_si512(from + 48)};
}

INLINE void store_sums(const Sums& sums, int32_t* to) {
    _mm512_store_si512(to, sums.a);
    _mm512_store_si512(to + 16, sums.b);
    _mm512_store_si512(to + 32, sums.c);
    _mm512_store_si512(to + 48, sums.d);
}

INLINE void add_products(Sums& sums, const Sums& weights, __m512i activations) {
    add_products(sums.a, weights.a, activations);
    add_products(sums.b, weights.b, activations);
    add_products(sums.c, weights.c, activations);
    add_products(sums.d, weights.d, activations);
}

// Add the products of four rows and one line. Bytes of u4 weights are multiplied whole, and their low nibbles once more:
// what is left of the difference is 16 times the high nibbles' sums, which need no instructions of their own.
template <bool kIsU4>
INLINE void add_four(const uint8_t* const* rows, size_t byte, __m512i activations, Sums& sums, Sums& whole) {
    const auto load = [&](size_t i) TARGET { return _mm512_loadu_si512(rows[i] + byte); };
    __m512i w[4];
    interleave(load(0), load(1), load(2), load(3), w);
    const Sums weights{w[0], w[1], w[2], w[3]};
    if (!kIsU4) return add_products(sums, weights, activations);
    const __m512i low = _mm512_set1_epi8(15);
    add_products(whole, weights, activations);
    add_products(sums,
                 {_mm512_and_si512(w[0], low), _mm512_and_si512(w[1], low), _mm512_and_si512(w[2], low),
                  _mm512_and_si512(w[3], low)},
                 activations);
}

INLINE __m512i high_nibbles(__m512i whole, __m512i low) { return _mm512_srai_epi32(_mm512_sub_epi32(whole, low), 4); }

INLINE Sums high_nibbles(const Sums& whole, const Sums& low) {
    return {high_nibbles(whole.a, low.a), high_nibbles(whole.b, low.b), high_nibbles(whole.c, low.c),
            high_nibbles(whole.d, low.d)};
}

template <bool kIsU4, bool kIsF16>
INLINE void add_line(const Sums& sums, __m512 scale, __m512i sum, const GroupFactors& factors, size_t output, float* acc) {
    add_dequantized<kIsU4, kIsF16>(sums.a, scale, sum, factors, output, acc);
    add_dequantized<kIsU4, kIsF16>(sums.b, scale, sum, factors, output + 16, acc + 16);
    add_dequantized<kIsU4, kIsF16>(sums.c, scale, sum, factors, output + 32, acc + 32);
    add_dequantized<kIsU4, kIsF16>(sums.d, scale, sum, factors, output + 48, acc + 48);
}

// One pass of kPassRows rows over a panel. The sums stay in `dots` between the passes of a segment; the last adds
// them to `acc`.
template <bool kIsU4, bool kIsF16, bool kIsFirst, bool kIsLast>
INLINE void multiply_pass(const uint8_t* data, size_t row_bytes, const uint32_t* row, const int8_t* quantized,
                          int32_t* dots, __m512 scale, __m512i sum, const GroupFactors& factors, float* acc) {
    const uint8_t *current[kPassRows], *next[kPassRows];
    for (size_t i = 0; i < kPassRows; ++i) {
        current[i] = data + row[i] * row_bytes;
        next[i] = data + row[kPrefetchPasses * kPassRows + i] * row_bytes;
    }
    const __m512i x0 = broadcast4(quantized), x1 = broadcast4(quantized + 4);
    for (size_t byte = 0; byte < row_bytes; byte += kLineBytes) {
        for (size_t i = 0; i < kPassRows; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(next[i] + byte), _MM_HINT_T1);
        const size_t output = kIsU4 ? 2 * byte : byte;
        Sums sums = kIsFirst ? no_sums() : load_sums(dots + output);
        Sums whole = kIsFirst || !kIsU4 ? no_sums() : load_sums(dots + output + kLineBytes);
        add_four<kIsU4>(current, byte, x0, sums, whole);
        add_four<kIsU4>(current + 4, byte, x1, sums, whole);
        if (!kIsLast) {
            store_sums(sums, dots + output);
            if (kIsU4) store_sums(whole, dots + output + kLineBytes);
            continue;
        }
        add_line<kIsU4, kIsF16>(sums, scale, sum, factors, output, acc + output);
        if (!kIsU4) continue;
        const size_t high = output + kLineBytes;
        add_line<kIsU4, kIsF16>(high_nibbles(whole, sums), scale, sum, factors, high, acc + high);
    }
}

template <bool kIsU4, bool kIsF16>
TARGET void multiply_integer(const Weights& weights, size_t panel, const KeptRows& kept, size_t token,
                             size_t pass_begin, size_t pass_end, float* acc) {
    alignas(64) int32_t dots[kMaxWidth];
    const uint8_t* data = weights.panel_data(panel);
    const size_t row_bytes = weights.row_bytes(panel);
    const uint32_t* row = kept.row.data();
    const int8_t* quantized = kept.quantized.data() + token * kept.length();
    const int32_t* pass_sum = kept.pass_sum.data() + token * kept.passes;
    for (size_t i = 0; i < kept.segments.size(); ++i) {
        const Segment& segment = kept.segments[i];
        const size_t first = std::max<size_t>(pass_begin, segment.pass_begin);
        const size_t last = std::min<size_t>(pass_end, segment.pass_end);
        if (first >= last) continue;
        int32_t part = 0;
        for (size_t pass = first; pass < last; ++pass) part += pass_sum[pass];
        const __m512i sum = _mm512_set1_epi32(part);
        const __m512 scale = _mm512_set1_ps(kept.scale[token * kept.segments.size() + i]);
        const GroupFactors factors = group_factors<kIsU4, kIsF16>(weights, panel, segment.group);
        const auto* r = row + first * kPassRows;
        const auto* q = quantized + first * kPassRows;
#define PASS(is_first, is_last) \
    multiply_pass<kIsU4, kIsF16, is_first, is_last>(data, row_bytes, r, q, dots, scale, sum, factors, acc)
        if (last - first == 1) {
            PASS(true, true);
            continue;
        }
        PASS(true, false);
        for (size_t pass = first + 1; pass < last - 1; ++pass) {
            r += kPassRows;
            q += kPassRows;
            PASS(false, false);
        }
        r += kPassRows;
        q += kPassRows;
        PASS(false, true);
#undef PASS
    }
}

template <bool kIsF16>
INLINE __m512 load_half(const uint16_t* weights) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    return kIsF16 ? _mm512_cvtph_ps(half) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <bool kIsF16>
TARGET void multiply_half(const Weights& weights, size_t panel, const KeptRows& kept, size_t token, size_t pass_begin,
                          size_t pass_end, float* acc) {
    const uint8_t* data = weights.panel_data(panel);
    const size_t row_bytes = weights.row_bytes(panel);
    for (size_t pass = pass_begin; pass < pass_end; ++pass) {
        const uint32_t* row = kept.row.data() + pass * kPassRows;
        const float* value = kept.value.data() + token * kept.length() + pass * kPassRows;
        for (size_t byte = 0; byte < row_bytes; byte += kLineBytes) {
            float* a = acc + byte / 2;
            __m512 a0 = _mm512_loadu_ps(a), a1 = _mm512_loadu_ps(a + 16);
#pragma GCC unroll 8
            for (size_t i = 0; i < kPassRows; ++i) {
                _mm_prefetch(reinterpret_cast<const char*>(data + row[kPrefetchPasses * kPassRows + i] * row_bytes + byte), _MM_HINT_T1);
                const auto* w = reinterpret_cast<const uint16_t*>(data + row[i] * row_bytes + byte);
                const __m512 x = _mm512_set1_ps(value[i]);
                a0 = _mm512_fmadd_ps(x, load_half<kIsF16>(w), a0);
                a1 = _mm512_fmadd_ps(x, load_half<kIsF16>(w + 16), a1);
            }
            _mm512_storeu_ps(a, a0);
            _mm512_storeu_ps(a + 16, a1);
        }
    }
}

TARGET void multiply(const Weights& weights, size_t panel, const KeptRows& kept, size_t token, size_t pass_begin,
                     size_t pass_end, float* acc) {
    switch (weights.type) {
        case WeightType::u8:
            return multiply_integer<false, false>(weights, panel, kept, token, pass_begin, pass_end, acc);
        case WeightType::u4:
            if (weights.is_scale_f16)
                return multiply_integer<true, true>(weights, panel, kept, token, pass_begin, pass_end, acc);
            return multiply_integer<true, false>(weights, panel, kept, token, pass_begin, pass_end, acc);
        case WeightType::f16:
            return multiply_half<true>(weights, panel, kept, token, pass_begin, pass_end, acc);
        case WeightType::bf16:
            return multiply_half<false>(weights, panel, kept, token, pass_begin, pass_end, acc);
    }
}

// ---- many tokens: interleave a segment's weights once, then keep a block of sums in registers ----

constexpr size_t kBlockTokens = 6;  // times 4 vectors of sums, 4 of weights, 1 of activations: 29 of 32 registers

// Written out for each token: the compiler keeps arrays of sums in memory, however short their loops.
#define FOR_EACH_TOKEN(statement) statement(0) statement(1) statement(2) statement(3) statement(4) statement(5)

// acc[t][64] += the segment's products for kTokens tokens and 64 outputs.
template <bool kIsU4, bool kIsF16, size_t kTokens>
TARGET __attribute__((noinline)) void multiply_block(const __m512i* interleaved, size_t fours, const int8_t* quantized,
                           size_t token_stride, const float* scale, const int32_t* sum, size_t segments,
                           const GroupFactors& factors, size_t output, float* acc, size_t acc_stride) {
#define START(t)                                                                                            \
    __m512i dot##t##0 = _mm512_setzero_si512(), dot##t##1 = dot##t##0, dot##t##2 = dot##t##0, dot##t##3 = dot##t##0;
#define MULTIPLY(t)                                                              \
    if (t < kTokens) {                                                           \
        const __m512i x = broadcast4(quantized + t * token_stride + 4 * four);   \
        add_products(dot##t##0, w0, x);                                             \
        add_products(dot##t##1, w1, x);                                             \
        add_products(dot##t##2, w2, x);                                             \
        add_products(dot##t##3, w3, x);                                             \
    }
#define ADD(t)                                                                                     \
    if (t < kTokens) {                                                                             \
        float* a = acc + t * acc_stride;                                                           \
        const __m512 factor = _mm512_set1_ps(scale[t * segments]);                                 \
        const __m512i total = _mm512_set1_epi32(sum[t * segments]);                                \
        add_dequantized<kIsU4, kIsF16>(dot##t##0, factor, total, factors, output, a);              \
        add_dequantized<kIsU4, kIsF16>(dot##t##1, factor, total, factors, output + 16, a + 16);    \
        add_dequantized<kIsU4, kIsF16>(dot##t##2, factor, total, factors, output + 32, a + 32);    \
        add_dequantized<kIsU4, kIsF16>(dot##t##3, factor, total, factors, output + 48, a + 48);    \
    }
    FOR_EACH_TOKEN(START)
    for (size_t four = 0; four < fours; ++four) {
        const __m512i w0 = interleaved[four * 4], w1 = interleaved[four * 4 + 1];
        const __m512i w2 = interleaved[four * 4 + 2], w3 = interleaved[four * 4 + 3];
        FOR_EACH_TOKEN(MULTIPLY)
    }
    FOR_EACH_TOKEN(ADD)
#undef START
#undef MULTIPLY
#undef ADD
}

// Up to so many tokens wait for memory, which likes rows to be read as a whole. More wait for the sums to come and go.
constexpr size_t kFewTokens = 4 * kBlockTokens;
constexpr size_t kFewRows = 128, kManyRows = 256;  // that they take at a time, of 64 outputs: 8 or 16 KiB

// acc += the products of segments [begin, end) and 64 outputs, whose weights are interleaved: [segments][fours][4].
template <bool kIsU4, bool kIsF16>
INLINE void multiply_interleaved(const Weights& weights, size_t panel, const KeptRows& kept, size_t begin, size_t end,
                                 const __m512i* interleaved, size_t token_begin, size_t token_end, size_t output,
                                 float* acc, size_t width) {
    const size_t segments = kept.segments.size();
    for (size_t token = token_begin; token < token_end; token += kBlockTokens) {
        const __m512i* from = interleaved;
        for (size_t s = begin; s < end; ++s) {
            const Segment& segment = kept.segments[s];
            const size_t fours = 2 * (segment.pass_end - segment.pass_begin);
            const GroupFactors factors = group_factors<kIsU4, kIsF16>(weights, panel, segment.group);
            const float* scale = kept.scale.data() + token * segments + s;
            const int32_t* sum = kept.segment_sum.data() + token * segments + s;
            const int8_t* quantized = kept.quantized.data() + token * kept.length() + segment.pass_begin * kPassRows;
            float* a = acc + (token - token_begin) * width;
#define BLOCK(n)                                                                                              \
    case n:                                                                                                   \
        multiply_block<kIsU4, kIsF16, n>(from, fours, quantized, kept.length(), scale, sum, segments, factors, \
                                         output, a, width);                                                   \
        break;
            switch (std::min(kBlockTokens, token_end - token)) { BLOCK(1) BLOCK(2) BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6) }
#undef BLOCK
            from += fours * 4;
        }
    }
}

template <bool kIsU4, bool kIsF16>
TARGET void multiply_tokens_integer(const Weights& weights, size_t panel, size_t begin, size_t end,
                                    const KeptRows& kept, size_t token_begin, size_t token_end, float* acc) {
    alignas(64) __m512i interleaved[kManyRows];  // [segments][fours][4 vectors]
    constexpr size_t kHalves = kIsU4 ? 2 : 1;
    const uint8_t* data = weights.panel_data(panel) + begin / kHalves;
    const size_t row_bytes = weights.row_bytes(panel), width = end - begin, segments = kept.segments.size();
    const size_t passes = (token_end - token_begin <= kFewTokens ? kFewRows : kManyRows) / kPassRows;
    for (size_t s = 0, s_end; s < segments; s = s_end) {
        const uint32_t first = kept.segments[s].pass_begin;
        for (s_end = s + 1; s_end < segments && kept.segments[s_end].pass_end - first <= passes;) ++s_end;
        const size_t last = kept.segments[s_end - 1].pass_end;
        Fetcher fetcher(data, row_bytes, width / kHalves, kept.row.data() + last * kPassRows,
                        std::min(passes, kept.passes - last) * kPassRows);
        for (size_t chunk = 0; chunk < width / 64; ++chunk) {
            const uint8_t* line = data + chunk / kHalves * kLineBytes;
            __m512i* to = interleaved;
            for (size_t four = 2 * first; four < 2 * last; ++four, to += 4) {
                const auto load = [&](size_t i) TARGET {
                    return load_weights<kIsU4>(line + kept.row[4 * four + i] * row_bytes, chunk % kHalves);
                };
                interleave(load(0), load(1), load(2), load(3), to);
                for (size_t i = 0; i < 4 / kHalves; ++i) fetcher.fetch();
            }
            multiply_interleaved<kIsU4, kIsF16>(weights, panel, kept, s, s_end, interleaved, token_begin, token_end,
                                                begin + 64 * chunk, acc + 64 * chunk, width);
        }
    }
}

template <bool kIsF16, size_t kTokens>
TARGET __attribute__((noinline)) void multiply_block_half(const uint8_t* data, size_t row_bytes, const uint32_t* row, size_t rows,
                                const float* value, size_t token_stride, float* acc, size_t acc_stride) {
#define START(t)                                                                      \
    const float* from##t = acc + (t < kTokens ? t : 0) * acc_stride;                  \
    __m512 sum##t##0 = _mm512_loadu_ps(from##t), sum##t##1 = _mm512_loadu_ps(from##t + 16), \
           sum##t##2 = _mm512_loadu_ps(from##t + 32), sum##t##3 = _mm512_loadu_ps(from##t + 48);
#define MULTIPLY(t)                                                         \
    if (t < kTokens) {                                                      \
        const __m512 x = _mm512_set1_ps(value[t * token_stride + k]);       \
        sum##t##0 = _mm512_fmadd_ps(x, w0, sum##t##0);                      \
        sum##t##1 = _mm512_fmadd_ps(x, w1, sum##t##1);                      \
        sum##t##2 = _mm512_fmadd_ps(x, w2, sum##t##2);                      \
        sum##t##3 = _mm512_fmadd_ps(x, w3, sum##t##3);                      \
    }
#define STORE(t)                                        \
    if (t < kTokens) {                                  \
        float* to = acc + t * acc_stride;               \
        _mm512_storeu_ps(to, sum##t##0);                \
        _mm512_storeu_ps(to + 16, sum##t##1);           \
        _mm512_storeu_ps(to + 32, sum##t##2);           \
        _mm512_storeu_ps(to + 48, sum##t##3);           \
    }
    FOR_EACH_TOKEN(START)
    for (size_t k = 0; k < rows; ++k) {
        const auto* w = reinterpret_cast<const uint16_t*>(data + row[k] * row_bytes);
        const __m512 w0 = load_half<kIsF16>(w), w1 = load_half<kIsF16>(w + 16);
        const __m512 w2 = load_half<kIsF16>(w + 32), w3 = load_half<kIsF16>(w + 48);
        FOR_EACH_TOKEN(MULTIPLY)
    }
    FOR_EACH_TOKEN(STORE)
#undef START
#undef MULTIPLY
#undef STORE
}

template <bool kIsF16>
TARGET void multiply_tokens_half(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                                 size_t token_begin, size_t token_end, float* acc) {
    const uint8_t* data = weights.panel_data(panel) + 2 * begin;
    const size_t row_bytes = weights.row_bytes(panel), width = end - begin;
    constexpr size_t kBlockRows = 128;  // of 64 outputs: 16 KiB, read again for each block of tokens
    for (size_t k = 0; k < kept.length(); k += kBlockRows) {
        const size_t rows = std::min(kBlockRows, kept.length() - k);
        for (size_t o = 0; o < width; o += 64)
            for (size_t token = token_begin; token < token_end; token += kBlockTokens) {
                const float* value = kept.value.data() + token * kept.length() + k;
                float* a = acc + (token - token_begin) * width + o;
#define BLOCK(n)                                                                                                    \
    case n:                                                                                                         \
        multiply_block_half<kIsF16, n>(data + 2 * o, row_bytes, kept.row.data() + k, rows, value, kept.length(), a, \
                                       width);                                                                      \
        break;
                switch (std::min(kBlockTokens, token_end - token)) {
                    BLOCK(1) BLOCK(2) BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6)
                }
#undef BLOCK
            }
    }
}

TARGET void multiply_tokens(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                            size_t token_begin, size_t token_end, float* acc) {
    switch (weights.type) {
        case WeightType::u8:
            return multiply_tokens_integer<false, false>(weights, panel, begin, end, kept, token_begin, token_end, acc);
        case WeightType::u4:
            if (weights.is_scale_f16)
                return multiply_tokens_integer<true, true>(weights, panel, begin, end, kept, token_begin, token_end,
                                                           acc);
            return multiply_tokens_integer<true, false>(weights, panel, begin, end, kept, token_begin, token_end, acc);
        case WeightType::f16:
            return multiply_tokens_half<true>(weights, panel, begin, end, kept, token_begin, token_end, acc);
        case WeightType::bf16:
            return multiply_tokens_half<false>(weights, panel, begin, end, kept, token_begin, token_end, acc);
    }
}

}  // namespace

const Kernels avx512_kernels{"avx512", compact, quantize, multiply, multiply_tokens, dot_rows_avx512, dot_row_avx512};

}  // namespace actsparse
#endif

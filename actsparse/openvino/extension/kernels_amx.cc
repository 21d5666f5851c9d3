// Kernels for AMX with INT8: several tokens are multiplied by tiles of 64 input channels and 16 outputs. All else is left
// to the AVX-512 kernels.
#include "kernels.hpp"

#if defined(ACTSPARSE_AMX)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "amx.hpp"
#include "avx512.hpp"
#include "fetcher.hpp"
#include "rows.hpp"

#define TARGET __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

// Fewer tokens are multiplied faster without tiles.
constexpr size_t kMinTokens = 12;
constexpr size_t kTileOutputs = 16;                        // columns of a tile of weights or sums
constexpr size_t kTileSums = kTileTokens * kTileOutputs;
constexpr size_t kLineTiles = 4;                           // that 64 outputs make
constexpr size_t kSteps = kSharedSegmentRows / kTileRows;  // tiles of input channels in a segment, at most

// Lay 64 outputs of a segment's rows out as tiles [steps][4][16 fours of rows][64].
template <bool kIsU4>
INLINE void lay_out(const uint8_t* line, bool is_high, size_t row_bytes, const uint32_t* row, size_t rows,
                    Fetcher& fetcher, uint8_t* to) {
    for (size_t k = 0; k < rows; k += 4) {
        __m512i r[4], w[4];
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) r[i] = load_weights<kIsU4>(line + row[k + i] * row_bytes, is_high);
        for (size_t i = 0; i < (kIsU4 ? 2 : 4); ++i) fetcher.fetch();
        interleave(r[0], r[1], r[2], r[3], w);
        uint8_t* out = to + k / kTileRows * kLineTiles * kTileBytes + k % kTileRows / 4 * 64;
#pragma GCC unroll 4
        for (size_t v = 0; v < 4; ++v) _mm512_store_si512(out + v * kTileBytes, w[v]);
    }
}

// A block of tokens times 32 outputs: dots[2][16 tokens][16 outputs]. Beside it, to `more`, another block of tokens times
// the same outputs, or without another the same block times the next 32.
template <bool kHasOther>
INLINE void multiply_tiles(const int8_t* tokens, const int8_t* others, const uint8_t* weights, size_t steps, int32_t* dots,
                           int32_t* more) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (size_t step = 0; step < steps; ++step, weights += kLineTiles * kTileBytes) {
        _tile_loadd(4, tokens + step * kTileBytes, 64);
        _tile_loadd(6, weights, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, weights + kTileBytes, 64);
        _tile_dpbsud(1, 4, 7);
        if (kHasOther) {
            _tile_loadd(5, others + step * kTileBytes, 64);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        } else {
            _tile_loadd(6, weights + 2 * kTileBytes, 64);
            _tile_dpbsud(2, 4, 6);
            _tile_loadd(7, weights + 3 * kTileBytes, 64);
            _tile_dpbsud(3, 4, 7);
        }
    }
    _tile_stored(0, dots, 64);
    _tile_stored(1, dots + kTileSums, 64);
    _tile_stored(2, more, 64);
    _tile_stored(3, more + kTileSums, 64);
}

// Of a tile's 16 outputs in one group of u4 weights.
struct Factors {
    __m512 scale, zero;
};

template <bool kIsF16>
INLINE Factors read_factors(const Weights& weights, size_t output) {
    const auto* zero = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(weights.zero) + output);
    return {load_scale<kIsF16>(weights.scale, output), _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(zero)))};
}

// acc[token][0..16) += what the integer sums of 16 outputs stand for; `scale` and `sum` belong to the tokens' segments.
template <bool kIsU4>
INLINE void add_dots(const int32_t* dots, size_t tokens, const float* scale, const int32_t* sum, size_t segments,
                     const Factors& factors, float* acc, size_t width) {
    for (size_t t = 0; t < tokens; ++t, acc += width) {
        __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(dots + 16 * t));
        const __m512 total = _mm512_set1_ps(static_cast<float>(sum[t * segments]));
        if (kIsU4)
            value = _mm512_mul_ps(_mm512_fnmadd_ps(factors.zero, total, value), factors.scale);
        else
            value = _mm512_fnmadd_ps(_mm512_set1_ps(kMiddle), total, value);
        _mm512_storeu_ps(acc, _mm512_fmadd_ps(value, _mm512_set1_ps(scale[t * segments]), _mm512_loadu_ps(acc)));
    }
}

template <bool kIsU4, bool kIsF16>
TARGET void multiply_tiled(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                           size_t token_begin, size_t token_end, float* acc) {
    constexpr size_t kHalves = kIsU4 ? 2 : 1, kDots = kLineTiles * kTileSums;
    alignas(64) uint8_t tiled[kSteps * kLineTiles * kTileBytes] = {};
    alignas(64) int32_t dots[2 * kDots];
    const size_t width = end - begin, tokens = token_end - token_begin, block = kept.tile_tokens;
    const size_t row_bytes = weights.row_bytes(panel), segments = kept.segments.size();
    const uint8_t* data = weights.panel_data(panel) + begin / kHalves;
    // Tiles 0 to 3 are sums, 4 and 5 activations, of `block` rows; 6 and 7 are weights.
    configure_tiles(block);
    for (size_t s = 0; s < segments; ++s) {
        const Segment& segment = kept.segments[s];
        const size_t rows = segment.rows(), steps = (rows + kTileRows - 1) / kTileRows;
        const uint32_t* row = kept.row.data() + segment.pass_begin * kPassRows;
        Fetcher fetcher(data, row_bytes, width / kHalves, row + rows, s + 1 < segments ? kept.segments[s + 1].rows() : 0);
        const size_t factor = segment.group * weights.out + panel * weights.panel_outputs() + begin;
        for (size_t chunk = 0; chunk < width / kLineBytes; ++chunk) {
            // What the last tile has beyond the segment's rows is multiplied by 0.
            lay_out<kIsU4>(data + chunk / kHalves * kLineBytes, chunk % kHalves, row_bytes, row, rows, fetcher, tiled);
            const auto add = [&](size_t t, const int32_t* from) TARGET {
                const size_t first = (token_begin + t) * segments + s;
                for (size_t tile = 0; tile < kLineTiles; ++tile) {
                    const size_t output = chunk * 64 + tile * kTileOutputs;
                    Factors factors;
                    if (kIsU4) factors = read_factors<kIsF16>(weights, factor + output);
                    add_dots<kIsU4>(from + tile * kTileSums, std::min(block, tokens - t),
                                    kept.scale.data() + first, kept.segment_sum.data() + first, segments, factors,
                                    acc + t * width + output, width);
                }
            };
            const auto tiles = [&](size_t t) {
                return kept.tiles.data() + kept.tile_place(token_begin + t) + segment.step * kTileBytes;
            };
            size_t t = 0;
            for (; t + block < tokens; t += 2 * block) {
                for (size_t half = 0; half < 2; ++half)
                    multiply_tiles<true>(tiles(t), tiles(t + block), tiled + half * 2 * kTileBytes, steps,
                                         dots + half * kDots / 2, dots + kDots + half * kDots / 2);
                add(t, dots);
                add(t + block, dots + kDots);
            }
            if (t < tokens) {
                multiply_tiles<false>(tiles(t), nullptr, tiled, steps, dots, dots + kDots / 2);
                add(t, dots);
            }
        }
    }
    _tile_release();
}

TARGET void multiply_tokens(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                            size_t token_begin, size_t token_end, float* acc) {
    const auto multiply = !kept.tile_steps                  ? avx512_kernels.multiply_tokens
                          : weights.type == WeightType::u8 ? multiply_tiled<false, false>
                          : weights.is_scale_f16           ? multiply_tiled<true, true>
                                                           : multiply_tiled<true, false>;
    multiply(weights, panel, begin, end, kept, token_begin, token_end, acc);
}

}  // namespace

bool is_amx_available() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 24 & 1 && d >> 25 & 1)) return false;  // AMX-TILE, AMX-INT8
    // The system has to be asked once: what tiles hold makes the state of a thread far larger.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels amx_kernels{"amx", avx512_kernels.compact, avx512_kernels.quantize, avx512_kernels.multiply, multiply_tokens,
                          avx512_kernels.dot_rows, avx512_kernels.dot_row, kMinTokens, multiply_rows_amx};

}  // namespace actsparse
#endif

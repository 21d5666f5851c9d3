// Kernels for AMX with bf16: many tokens are multiplied by tiles of 16 outputs, in bf16 activations and f32 sums. All
// else is left to the AVX-512 kernels. Weights without their zero point fit bf16 exactly.
#include "kernels.hpp"

#if defined(ACTSPARSE_AMX)
#include <immintrin.h>

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "scratch.hpp"

#define TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

constexpr size_t kTile = 1024;        // bytes of a tile: 16 rows of 64
constexpr size_t kTileOutputs = 16;   // columns of a tile of weights or sums
constexpr size_t kTileRows = kHalfRows;  // input channels in a tile of weights, two in each of its rows
constexpr size_t kLineTiles = 4;      // tiles of outputs that a line of 64 makes
// Fewer tokens do not pay for widening all weights.
constexpr size_t kMinTokens = 16;
// Input channels that are widened at a time: a line of each becomes 16 KiB, which stay in the first-level cache.
constexpr size_t kDepth = 128;
// Bytes of weights that are fetched while others are multiplied.
constexpr size_t kFetchedBytes = 512 * 1024;

// The first layout of LDTILECFG.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 activations, of `tokens` rows; 6 and 7 are weights.
INLINE void configure(size_t tokens) {
    TileConfig config;
    for (size_t tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? tokens : 16);
    }
    _tile_loadconfig(&config);
}

TARGET float round_to_bf16(const float* value, size_t n, uint16_t* half) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t k = 0; k < n; k += kHalfRows, half += kHalfTokens * kHalfRows)
#pragma GCC unroll 2
        for (size_t i = 0; i < kHalfRows; i += 16) {
            const size_t rest = n > k + i ? n - k - i : 0;
            const __mmask16 valid = rest < 16 ? static_cast<__mmask16>((1u << rest) - 1) : 0xffff;
            const auto bits = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(valid, value + k + i));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), bits);
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
        }
    return _mm512_reduce_add_ps(sum);
}

// Four vectors of 16 outputs of a line to four of a tile each, or back: column 4 v + d of tile l is output
// 16 v + 4 l + d.
INLINE void transpose(__m512 x[4]) {
    const __m512 a = _mm512_shuffle_f32x4(x[0], x[1], 0x44), b = _mm512_shuffle_f32x4(x[2], x[3], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(x[0], x[1], 0xee), d = _mm512_shuffle_f32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_f32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
    x[2] = _mm512_shuffle_f32x4(c, d, 0x88);
    x[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

// Of a line of 64 outputs in one group of u4 weights, in the order of tiles.
struct Factors {
    __m512 scale[kLineTiles];
    __m512 zero[kLineTiles];  // times scale
};

template <bool kIsF16>
INLINE void read_factors(const Weights& weights, size_t first, Factors& factors) {
    for (size_t v = 0; v < 4; ++v) {
        const size_t o = first + 16 * v;
        if (kIsF16)
            factors.scale[v] = _mm512_cvtph_ps(_mm256_loadu_si256(
                reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(weights.scale) + o)));
        else
            factors.scale[v] = _mm512_loadu_ps(static_cast<const float*>(weights.scale) + o);
        const auto* zero = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(weights.zero) + o);
        factors.zero[v] = _mm512_mul_ps(factors.scale[v], _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(zero))));
    }
    transpose(factors.scale);
    transpose(factors.zero);
}

// 16 weights of one row as floats whose upper halves are the nearest bf16.
template <bool kIsU4>
INLINE __m512i widen(__m128i bytes, bool is_high, const Factors& factors, size_t tile) {
    if (kIsU4) bytes = _mm_and_si128(is_high ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
    const __m512 integer = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    if (!kIsU4) return _mm512_castps_si512(integer);  // exact
    const __m512 value = _mm512_fmsub_ps(integer, factors.scale[tile], factors.zero[tile]);
    return _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000));
}

// Fetches rows into the second-level cache one after another, a line at a time, while earlier ones are multiplied.
class Fetcher {
public:
    Fetcher(const uint8_t* data, size_t row_bytes, size_t bytes, const uint32_t* row, size_t rows)
        : m_data(data), m_row_bytes(row_bytes), m_bytes(bytes), m_row(row), m_end(row + rows) {
        start_row();
    }
    void fetch() {
        if (m_row == m_end) return;
        __builtin_prefetch(m_from, 0, 2);
        m_from += kLineBytes;
        if (m_from == m_to) {
            ++m_row;
            start_row();
        }
    }

private:
    void start_row() {
        if (m_row == m_end) return;
        m_from = m_data + *m_row * m_row_bytes;
        m_to = m_from + m_bytes;
    }

    const uint8_t* m_data;
    size_t m_row_bytes, m_bytes;
    const uint32_t *m_row, *m_end;
    const uint8_t *m_from = nullptr, *m_to = nullptr;
};

// Rows [begin, end) of those that are widened together share a group.
struct Run {
    size_t begin, end, group;
};

// Widen 64 weights of each row of a run to tiles [rows / 32][4], rows in pairs.
template <bool kIsU4>
INLINE void widen_line(const uint8_t* line, bool is_high, size_t row_bytes, const uint32_t* row, const Run& run,
                       const Factors& factors, Fetcher& fetcher, uint8_t* to) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    for (size_t k = run.begin; k < run.end; k += 2) {
        const auto* a = reinterpret_cast<const __m128i*>(line + row[k] * row_bytes);
        const auto* b = reinterpret_cast<const __m128i*>(line + row[k + 1] * row_bytes);
        uint8_t* out = to + k / kTileRows * kLineTiles * kTile + k % kTileRows / 2 * 64;
        fetcher.fetch();
        if (!kIsU4) fetcher.fetch();
#pragma GCC unroll 4
        for (size_t l = 0; l < kLineTiles; ++l) {
            const __m512i low = widen<kIsU4>(_mm_loadu_si128(a + l), is_high, factors, l);
            const __m512i high = widen<kIsU4>(_mm_loadu_si128(b + l), is_high, factors, l);
            // (high & upper) | low >> 16
            _mm512_store_si512(out + l * kTile,
                               _mm512_ternarylogic_epi32(high, upper, _mm512_srli_epi32(low, 16), 0xea));
        }
    }
}

// sums[token block][output tile] (+)= activations times weights, for two blocks of tokens and two tiles of outputs.
template <bool kIsFirst, bool kHasSecond>
INLINE void multiply_tiles(const uint8_t* half, size_t block_bytes, const uint8_t* weights, size_t steps, float* sums,
                           size_t sums_stride) {
    constexpr size_t kStep = kLineTiles * kTile;
    if (kIsFirst) {
        _tile_zero(0);
        _tile_zero(1);
        if (kHasSecond) _tile_zero(2);
        if (kHasSecond) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if (kHasSecond) _tile_loadd(2, sums + sums_stride, 64);
        if (kHasSecond) _tile_loadd(3, sums + sums_stride + 256, 64);
    }
    for (size_t k = 0; k < steps; ++k) {
        _tile_loadd(4, half + kTile * k, 64);
        _tile_loadd(6, weights + k * kStep, 64);
        _tile_loadd(7, weights + k * kStep + kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (kHasSecond) {
            _tile_loadd(5, half + block_bytes + kTile * k, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (kHasSecond) _tile_stored(2, sums + sums_stride, 64);
    if (kHasSecond) _tile_stored(3, sums + sums_stride + 256, 64);
}

// The groups that rows [begin, begin + rows) of the list go through; `segment` is the first that may hold one.
template <bool kIsU4>
size_t find_runs(const KeptRows& kept, size_t begin, size_t rows, size_t& segment, Run* runs) {
    if (!kIsU4) {
        runs[0] = {0, rows, 0};
        return 1;
    }
    size_t count = 0;
    for (size_t at = 0; at < rows;) {
        while (kept.segments[segment].pass_end * kPassRows <= begin + at) ++segment;
        const size_t end = std::min<size_t>(rows, kept.segments[segment].pass_end * kPassRows - begin);
        const size_t group = kept.segments[segment].group;
        if (count && runs[count - 1].group == group)
            runs[count - 1].end = end;
        else
            runs[count++] = {at, end, group};
        at = end;
    }
    return count;
}

// acc[token - token_begin][output - begin] = the products of all rows.
template <bool kIsU4, bool kIsF16>
TARGET void multiply_tiled(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                           size_t token_begin, size_t token_end, float* acc) {
    static thread_local std::vector<float> scratch;
    alignas(64) static thread_local uint8_t widened[kDepth / kTileRows * kLineTiles * kTile];
    const size_t width = end - begin, tokens = token_end - token_begin, lines = width / kLineBytes;
    const size_t bytes = kIsU4 ? width / 2 : width, row_bytes = weights.row_bytes(panel);
    const uint8_t* data = weights.panel_data(panel) + (kIsU4 ? begin / 2 : begin);
    // What the last block of tokens has beyond the end is not read again.
    const size_t block = kept.half_tokens, blocks = (tokens + block - 1) / block, block_bytes = kept.half_steps * kTile;
    // As many rows at a time as stay in the second-level cache until they are needed.
    const size_t depth = std::clamp(kFetchedBytes / bytes / kTileRows * kTileRows, kTileRows, kDepth);
    const size_t length = kept.length();
    float* sums = align(grow(scratch, blocks * lines * kLineTiles * 256 + 16));
    configure(block);
    for (size_t k = 0, segment = 0; k < length; k += depth) {
        const size_t rows = std::min(depth, length - k), steps = (rows + kTileRows - 1) / kTileRows;
        const uint32_t* row = kept.row.data() + k;
        Fetcher fetcher(data, row_bytes, bytes, row + rows, std::min(depth, length - k - rows));
        Run runs[kDepth / kPassRows];
        const size_t count = find_runs<kIsU4>(kept, k, rows, segment, runs);
        for (size_t line = 0; line < lines; ++line) {
            const uint8_t* at = data + (kIsU4 ? line / 2 : line) * kLineBytes;
            for (const Run* run = runs; run < runs + count; ++run) {
                Factors factors;
                if (kIsU4)
                    read_factors<kIsF16>(weights, run->group * weights.out + panel * weights.panel_outputs() + begin + 64 * line,
                                         factors);
                widen_line<kIsU4>(at, line % 2, row_bytes, row, *run, factors, fetcher, widened);
            }
            // Activations beyond the last row are 0, but weights there must be numbers.
            for (size_t r = rows % kTileRows; r && r < kTileRows; r += 2)
                for (size_t l = 0; l < kLineTiles; ++l)
                    std::memset(widened + ((steps - 1) * kLineTiles + l) * kTile + r / 2 * 64, 0, 64);
            for (size_t b = 0; b < blocks; b += 2) {
                const auto* half = reinterpret_cast<const uint8_t*>(kept.half.data()) +
                                   (token_begin / block + b) * block_bytes + k / kTileRows * kTile;
                float* s = sums + (b * lines + line) * kLineTiles * 256;
                for (size_t l = 0; l < kLineTiles; l += 2) {
#define MULTIPLY(is_first, has_second)     multiply_tiles<is_first, has_second>(half, block_bytes, widened + l * kTile, steps, s + l * 256, lines * kLineTiles * 256)
                    if (k == 0)
                        b + 1 < blocks ? MULTIPLY(true, true) : MULTIPLY(true, false);
                    else
                        b + 1 < blocks ? MULTIPLY(false, true) : MULTIPLY(false, false);
#undef MULTIPLY
                }
            }
        }
    }
    _tile_release();
    for (size_t t = 0; t < tokens; ++t) {
        const __m512 middle = _mm512_set1_ps(kIsU4 ? 0.0f : static_cast<float>(kMiddle) * kept.sum[token_begin + t]);
        for (size_t line = 0; line < lines; ++line) {
            const float* from = sums + (t / block * lines + line) * kLineTiles * 256 + t % block * 16;
            __m512 x[4];
            for (size_t l = 0; l < 4; ++l) x[l] = _mm512_sub_ps(_mm512_load_ps(from + l * 256), middle);
            transpose(x);
            for (size_t v = 0; v < 4; ++v) _mm512_storeu_ps(acc + t * width + line * 64 + 16 * v, x[v]);
        }
    }
}

TARGET void multiply_tokens(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                            size_t token_begin, size_t token_end, float* acc) {
    const auto multiply = !kept.half_steps                  ? avx512_kernels.multiply_tokens
                          : weights.type == WeightType::u8 ? multiply_tiled<false, false>
                          : weights.is_scale_f16           ? multiply_tiled<true, true>
                                                           : multiply_tiled<true, false>;
    multiply(weights, panel, begin, end, kept, token_begin, token_end, acc);
}

}  // namespace

bool is_amx_available() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool has_tiles = d >> 22 & 1 && d >> 24 & 1;  // AMX-BF16, AMX-TILE
    if (!has_tiles || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // AVX512-BF16
    // The system has to be asked once: what tiles hold makes the state of a thread far larger.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels amx_kernels{"amx", avx512_kernels.compact, avx512_kernels.quantize, avx512_kernels.multiply, multiply_tokens,
                          avx512_kernels.dot_rows, avx512_kernels.dot_row, kMinTokens, round_to_bf16};

}  // namespace actsparse
#endif

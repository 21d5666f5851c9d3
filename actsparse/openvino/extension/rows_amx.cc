// Rows of weights times several tokens by AMX: 16 rows as they lie in memory are a tile. Nearly every row is kept by some
// token, so all are multiplied, and the gates are looked at when products are written.
#include "kernels.hpp"

#if defined(ACTSPARSE_AMX)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "amx.hpp"
#include "avx512.hpp"
#include "rows.hpp"
#include "scratch.hpp"

#define TARGET __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace actsparse {
namespace {

constexpr size_t kTile = 16;  // rows, or tokens
constexpr size_t kTaskRows = 2 * kTile;
constexpr size_t kSums = kTile * kTile;

// The inputs of all tokens, in blocks of kTile tokens; zeros beyond the last token.
struct Inputs {
    size_t blocks, steps, segments, segment_steps;
    const int8_t* tiles;  // [blocks][steps][kTile lanes of four channels][kTile tokens][4]
    const float* scale;   // [blocks][segments][kTile]
    const float* sum;     // [blocks][segments][kTile]: scale times the sum of what is quantised
    const float* total;   // [blocks][kTile]: of all segments
};

struct Scratch {
    std::vector<int8_t> tiles;
    std::vector<float> scale, sum, total;
};

Scratch& scratch() {
    static thread_local Scratch s;
    return s;
}

// Rows of one task: where they lie or, unpacked or padded to whole tiles, a copy of them.
struct TaskScratch {
    std::vector<uint8_t> rows;
    std::vector<float> value;
    std::vector<int8_t> quantized;
};

TaskScratch& task_scratch() {
    static thread_local TaskScratch s;
    return s;
}

void quantize_block(const float* x, size_t in_features, size_t in, size_t tokens, const Inputs& inputs, size_t block,
                    int8_t* tiles, float* scale, float* sum, float* total, const Kernels& kernels) {
    const size_t length = inputs.segment_steps * kTileRows, count = std::min(kTile, tokens - block * kTile);
    float* value = grow(task_scratch().value, in);
    int8_t* quantized = grow(task_scratch().quantized, in);
    int8_t* to = tiles + block * inputs.steps * kTileBytes;
    std::memset(to, 0, inputs.steps * kTileBytes);
    std::fill_n(scale + block * inputs.segments * kTile, inputs.segments * kTile, 0.0f);
    std::fill_n(sum + block * inputs.segments * kTile, inputs.segments * kTile, 0.0f);
    std::fill_n(total + block * kTile, kTile, 0.0f);
    for (size_t t = 0; t < count; ++t) {
        std::memcpy(value, x + (block * kTile + t) * in_features, in_features * sizeof(float));
        std::fill(value + in_features, value + in, 0.0f);
        for (size_t s = 0; s < inputs.segments; ++s) {
            const size_t begin = s * length, n = std::min(length, in - begin), at = (block * inputs.segments + s) * kTile + t;
            int32_t pass_sum[kSharedSegmentRows / kPassRows];
            kernels.quantize(value + begin, n, quantized + begin, scale + at, pass_sum, nullptr);
            int32_t quantized_sum = 0;
            for (size_t pass = 0; pass < n / kPassRows; ++pass) quantized_sum += pass_sum[pass];
            sum[at] = scale[at] * static_cast<float>(quantized_sum);
            total[block * kTile + t] += sum[at];
        }
        for (size_t lane = 0; lane < in / 4; ++lane) std::memcpy(to + (lane * kTile + t) * 4, quantized + lane * 4, 4);
    }
}

// Rows [begin, begin + kTaskRows) as tiles read them: [kTaskRows][in], rows beyond the last one zero.
TARGET const uint8_t* task_rows(const RowWeights& weights, size_t begin) {
    const size_t count = std::min(kTaskRows, weights.out - begin), in = weights.in;
    if (weights.type == WeightType::u8 && count == kTaskRows) return weights.row(begin);
    uint8_t* to = grow(task_scratch().rows, kTaskRows * in);
    std::memset(to + count * in, 0, (kTaskRows - count) * in);
    if (weights.type == WeightType::u8) {
        std::memcpy(to, weights.row(begin), count * in);
        return to;
    }
    for (size_t k = 0; k < count * in; k += kRowLine)
        _mm512_storeu_si512(to + k, load_row_nibbles(weights.row(begin) + k / 2));
    return to;
}

// sums[row][token] += what the integer sums of 16 rows and one segment stand for, without scale and zero point of u8.
INLINE void add_segment(const int32_t* dots, const RowWeights& weights, size_t row, size_t group, const float* scale,
                        const float* sum, float* sums) {
    const __m512 factor = _mm512_loadu_ps(scale), total = _mm512_loadu_ps(sum);
    for (size_t r = 0; r < kTile; ++r) {
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(dots + r * kTile)), factor);
        if (weights.type == WeightType::u4) {
            const size_t index = std::min(row + r, weights.out - 1) * weights.groups() + group;
            const float zero = static_cast<const uint8_t*>(weights.zero)[index];
            value = _mm512_mul_ps(_mm512_fnmadd_ps(_mm512_set1_ps(zero), total, value), _mm512_set1_ps(weights.group_scale(index)));
        }
        _mm512_store_ps(sums + r * kTile, _mm512_add_ps(value, _mm512_load_ps(sums + r * kTile)));
    }
}

// Two tiles of rows times two of tokens, or the second ones once more: sums[2 of rows][2 of tokens][row][token].
INLINE void multiply_tiles(const RowWeights& weights, const uint8_t* rows, size_t row, const Inputs& inputs, size_t block,
                           size_t other, float* sums) {
    alignas(64) int32_t dots[4 * kSums];
    const int8_t* tokens[2] = {inputs.tiles + block * inputs.steps * kTileBytes, inputs.tiles + other * inputs.steps * kTileBytes};
    std::fill_n(sums, 4 * kSums, 0.0f);
    for (size_t s = 0; s < inputs.segments; ++s) {
        const size_t begin = s * inputs.segment_steps, end = std::min(inputs.steps, begin + inputs.segment_steps);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (size_t step = begin; step < end; ++step) {
            _tile_loadd(4, rows + step * kTileRows, weights.in);
            _tile_loadd(5, rows + kTile * weights.in + step * kTileRows, weights.in);
            _tile_loadd(6, tokens[0] + step * kTileBytes, 64);
            _tile_loadd(7, tokens[1] + step * kTileBytes, 64);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
        _tile_stored(0, dots, 64);
        _tile_stored(1, dots + kSums, 64);
        _tile_stored(2, dots + 2 * kSums, 64);
        _tile_stored(3, dots + 3 * kSums, 64);
        const size_t group = begin * kTileRows / weights.group;
        for (size_t i = 0; i < 4; ++i) {
            const size_t at = ((i % 2 ? other : block) * inputs.segments + s) * kTile;
            add_segment(dots + i * kSums, weights, row + i / 2 * kTile, group, inputs.scale + at, inputs.sum + at, sums + i * kSums);
        }
    }
}

// gate[token][row] *= sums[row][token] of 16 rows, where the gate is above the threshold; else it becomes 0.
INLINE void write_tile(const RowWeights& weights, const float* threshold, size_t row, const Inputs& inputs, size_t block,
                       size_t tokens, const float* sums, float* gate) {
    if (row >= weights.out) return;
    const auto valid = static_cast<__mmask16>(weights.out - row < kTile ? (1u << (weights.out - row)) - 1 : 0xffff);
    const __m512i columns = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    const __m512 limit = _mm512_maskz_loadu_ps(valid, threshold + row);
    __m512 scale = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
    if (weights.type == WeightType::u8) {
        scale = _mm512_maskz_loadu_ps(valid, static_cast<const float*>(weights.scale) + row);
        zero = _mm512_maskz_loadu_ps(valid, static_cast<const float*>(weights.zero) + row);
    }
    for (size_t t = 0; t < std::min(kTile, tokens - block * kTile); ++t) {
        float* to = gate + (block * kTile + t) * weights.out + row;
        const __m512 g = _mm512_maskz_loadu_ps(valid, to);
        const __mmask16 kept = _mm512_mask_cmp_ps_mask(valid, _mm512_abs_ps(g), limit, _CMP_NLE_UQ);
        const __m512 y = _mm512_fnmadd_ps(zero, _mm512_set1_ps(inputs.total[block * kTile + t]), _mm512_i32gather_ps(columns, sums + t, 4));
        _mm512_mask_storeu_ps(to, valid, _mm512_maskz_mul_ps(kept, g, _mm512_mul_ps(y, scale)));
    }
}

TARGET void multiply_task(const RowWeights& weights, const float* threshold, size_t row, const Inputs& inputs,
                          size_t tokens, float* gate) {
    alignas(64) float sums[4 * kSums];
    const uint8_t* rows = task_rows(weights, row);
    configure_tiles(kTile);
    for (size_t block = 0; block < inputs.blocks; block += 2) {
        const size_t other = std::min(block + 1, inputs.blocks - 1);
        multiply_tiles(weights, rows, row, inputs, block, other, sums);
        for (size_t i = 0; i < 4; ++i)
            if (i % 2 == 0 || other > block)
                write_tile(weights, threshold, row + i / 2 * kTile, inputs, i % 2 ? other : block, tokens, sums + i * kSums, gate);
    }
    _tile_release();
}

}  // namespace

void multiply_rows_amx(const RowWeights& weights, const float* threshold, const float* x, size_t in_features, size_t tokens,
                       float* gate, const Kernels& kernels, const Threads& threads) {
    const size_t in = weights.in, steps = in / kTileRows, blocks = (tokens + kTile - 1) / kTile;
    const size_t segment_steps = weights.group % kSharedSegmentRows == 0 || weights.type == WeightType::u8 ? kSharedSegmentRows / kTileRows : 1;
    const size_t segments = (steps + segment_steps - 1) / segment_steps;
    int8_t* tiles = grow(scratch().tiles, blocks * steps * kTileBytes);
    float* scale = grow(scratch().scale, blocks * segments * kTile);
    float* sum = grow(scratch().sum, blocks * segments * kTile);
    float* total = grow(scratch().total, blocks * kTile);
    const Inputs inputs{blocks, steps, segments, segment_steps, tiles, scale, sum, total};
    threads.run(blocks, [&](size_t block) {
        quantize_block(x, in_features, in, tokens, inputs, block, tiles, scale, sum, total, kernels);
    });
    threads.run((weights.out + kTaskRows - 1) / kTaskRows, [&](size_t task) {
        multiply_task(weights, threshold, task * kTaskRows, inputs, tokens, gate);
    });
}

}  // namespace actsparse
#endif

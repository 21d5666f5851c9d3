// The inner loops, one table for each instruction set; which one runs is chosen when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kept_rows.hpp"
#include "weights.hpp"

namespace actsparse {

struct RowWeights;
struct RowInput;
struct Threads;

struct Kernels {
    const char* name;

    // Write the channels j of [begin, end) with |x[j]| > threshold[j] (or NaN), and their values; return how many.
    // Both outputs have room for 16 entries more than end - begin.
    size_t (*compact)(const float* x, const float* threshold, size_t begin, size_t end, uint32_t* row, float* value);

    // value[0..n) -> scale * quantized, n a multiple of kPassRows; the residual is left in `rest` where it is not null.
    // A value that is not finite makes the scale NaN.
    void (*quantize)(const float* value, size_t n, int8_t* quantized, float* scale, int32_t* pass_sum, float* rest);

    // acc[width(panel)] += the products of passes [pass_begin, pass_end) of one token.
    void (*multiply)(const Weights& weights, size_t panel, const KeptRows& kept, size_t token, size_t pass_begin,
                     size_t pass_end, float* acc);

    // acc[token - token_begin][output - begin] += the products of all passes; begin and end are multiples of the
    // outputs in a line.
    void (*multiply_tokens)(const Weights& weights, size_t panel, size_t begin, size_t end, const KeptRows& kept,
                            size_t token_begin, size_t token_end, float* acc);

    // Some rows of weights times an input, and one row times some inputs: see rows.hpp.
    void (*dot_rows)(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched, const RowInput& input,
                     float* y);
    void (*dot_row)(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* const* inputs,
                    size_t count, float* y);

    // From so many tokens on multiply_tokens takes integer weights times activations in tiles, where these need not be
    // exact.
    size_t min_tile_tokens = SIZE_MAX;

    // The same for rows: as multiply_rows of rows.hpp, for integer weights.
    void (*multiply_rows)(const RowWeights& weights, const float* threshold, const float* x, size_t in_features,
                          size_t tokens, float* gate, const Kernels& kernels, const Threads& threads) = nullptr;
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// Compilers have known AMX since these.
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define ACTSPARSE_AMX
extern const Kernels amx_kernels;

// Whether the processor has AMX for INT8, and the system lets this process use it.
bool is_amx_available();
#endif

// Compilers since these let a function use instructions that others may not; before them all code must be allowed to.
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && \
    ((defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10) || defined(__ARM_FEATURE_MATMUL_INT8))
#define ACTSPARSE_NEON
extern const Kernels neon_kernels, i8mm_kernels;
#endif

// The kernels this processor can run, best first.
std::vector<const Kernels*> available_kernels();

// The best of them, or the one that the environment variable ACTSPARSE_ISA names (portable; avx2, avx512, amx; neon,
// i8mm).
const Kernels& selected_kernels();

}  // namespace actsparse

// What the kernels of rows have in common, whatever the instruction set: a tile, and which of its sizes runs.
#pragma once

#include "rows.hpp"

namespace actsparse {

// A tile of rows and inputs: their data, and the rows to fetch meanwhile.
template <size_t kRows, size_t kTokens>
struct RowTile {
    const uint8_t* row[kRows];
    const uint8_t* next[kRows];
    const RowInput* input[kTokens];

    RowTile(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched, const RowInput* const* inputs) {
        for (size_t r = 0; r < kRows; ++r) {
            row[r] = weights.row(rows[r]);
            next[r] = weights.row(fetched[r]);
        }
        for (size_t t = 0; t < kTokens; ++t) input[t] = inputs[t];
    }

    // Line by line of all rows: a row that is fetched at once brings hardware prefetchers to fetch its neighbours.
    inline __attribute__((always_inline)) void fetch(size_t byte) const {
        if (byte % kLineBytes) return;
#pragma GCC unroll 8
        for (size_t r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + byte, 0, 2);  // into the second-level cache
    }
};

// Kernels::dot_rows and dot_row by means of Dots::run<rows, tokens>.
template <typename Dots>
void run_rows(const RowWeights& weights, const uint32_t* rows, const uint32_t* fetched, const RowInput& input, float* y) {
    const RowInput* const inputs[] = {&input};
    Dots::template run<kDotRows, 1>(weights, rows, fetched, inputs, y);
}

template <typename Dots>
void run_row(const RowWeights& weights, uint32_t row, uint32_t fetched, const RowInput* const* inputs, size_t count,
             float* y) {
    switch (count) {
        case 1: return Dots::template run<1, 1>(weights, &row, &fetched, inputs, y);
        case 2: return Dots::template run<1, 2>(weights, &row, &fetched, inputs, y);
        case 3: return Dots::template run<1, 3>(weights, &row, &fetched, inputs, y);
        default: return Dots::template run<1, kDotTokens>(weights, &row, &fetched, inputs, y);
    }
}

}  // namespace actsparse

// How fast memory can be read in the way that the kernels read weights: what they could reach at best.
#pragma once

#include <cstddef>
#include <cstdint>

#include "threads.hpp"

namespace actsparse {

// Bytes per second.
struct ReadingSpeeds {
    double all;   // of all rows of a page
    double half;  // of a random half of them
};

// Sum up the words of rows of a page, which begin at a page, kPassRows rows at a time, as kernels do.
uint64_t sum_rows(const uint64_t* data, const uint32_t* row, size_t rows);

// Take the best of so many rounds, each over so many bytes. Zeros where there is no memory for them.
ReadingSpeeds measure_reading(size_t bytes, size_t rounds, const Threads& threads);

}  // namespace actsparse

#include "reading.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <numeric>
#include <random>
#include <vector>

#include "pages.hpp"
#include "weights.hpp"

namespace actsparse {
namespace {

constexpr size_t kLineWords = kLineBytes / sizeof(uint64_t);
constexpr size_t kPageWords = kPageBytes / sizeof(uint64_t);

// A line as GCC and Clang add it up with what vectors the processor has.
using Line = uint64_t __attribute__((vector_size(kLineBytes), may_alias));

// Add kRows of the rows that are left line by line, and fetch those that come kPrefetchPasses later, or the last one.
template <size_t kRows>
void add_rows(const uint64_t* data, const uint32_t* row, size_t left, Line& sum) {
    const uint64_t *current[kRows], *next[kRows];
    for (size_t k = 0; k < kRows; ++k) {
        current[k] = data + row[k] * kPageWords;
        next[k] = data + row[std::min(left - 1, kPrefetchPasses * kPassRows + k)] * kPageWords;
    }
    for (size_t word = 0; word < kPageWords; word += kLineWords)
        for (size_t k = 0; k < kRows; ++k) {
            __builtin_prefetch(next[k] + word, 0, 2);  // into the second-level cache
            sum += *reinterpret_cast<const Line*>(current[k] + word);
        }
}

double read_per_second(const uint64_t* data, const std::vector<uint32_t>& rows, const Threads& threads) {
    std::vector<uint64_t> sums(threads.count);
    const auto start = std::chrono::steady_clock::now();
    threads.run(threads.count, [&](size_t share) {
        const size_t begin = rows.size() * share / threads.count, end = rows.size() * (share + 1) / threads.count;
        sums[share] = sum_rows(data, rows.data() + begin, end - begin);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    // Every word is 1. A sum that nobody looked at need not be computed.
    const bool is_read = std::accumulate(sums.begin(), sums.end(), uint64_t{0}) == rows.size() * kPageWords;
    return is_read ? static_cast<double>(rows.size() * kPageBytes) / seconds.count() : 0;
}

}  // namespace

uint64_t sum_rows(const uint64_t* data, const uint32_t* row, size_t rows) {
    Line sum = {};
    size_t i = 0;
    for (; i + kPassRows <= rows; i += kPassRows) add_rows<kPassRows>(data, row + i, rows - i, sum);
    for (; i < rows; ++i) add_rows<1>(data, row + i, rows - i, sum);
    uint64_t total = 0;
    for (size_t w = 0; w < kLineWords; ++w) total += sum[w];
    return total;
}

ReadingSpeeds measure_reading(size_t bytes, size_t rounds, const Threads& threads) {
    Pages pages;
    auto* data = reinterpret_cast<uint64_t*>(pages.allocate(bytes));
    if (!data) return {0, 0};
    std::vector<uint32_t> all(bytes / kPageBytes), half;
    std::iota(all.begin(), all.end(), 0);
    std::mt19937 generator(1);
    std::copy_if(all.begin(), all.end(), std::back_inserter(half), [&](uint32_t) { return generator() % 2 == 0; });
    // Written by the threads that read it, so that each has its rows in memory nearby.
    threads.run(threads.count, [&](size_t share) {
        const size_t begin = all.size() * share / threads.count, end = all.size() * (share + 1) / threads.count;
        std::fill(data + begin * kPageWords, data + end * kPageWords, uint64_t{1});
    });
    ReadingSpeeds best{0, 0};
    for (size_t round = 0; round < rounds; ++round) {
        best.all = std::max(best.all, read_per_second(data, all, threads));
        best.half = std::max(best.half, read_per_second(data, half, threads));
    }
    return best;
}

}  // namespace actsparse

// Reading rows of memory: every word of them is read once.
#include "check.hpp"
#include "pages.hpp"
#include "reading.hpp"
#include "weights.hpp"

using namespace actsparse;

void test_reading() {
    constexpr size_t kPages = 50, kWords = kPageBytes / sizeof(uint64_t);
    Pages pages;
    auto* data = reinterpret_cast<uint64_t*>(pages.allocate(kPages * kPageBytes));
    for (size_t i = 0; i < kPages * kWords; ++i) data[i] = static_cast<uint64_t>(integer(0, 1000));
    for (size_t count : {0, 1, 7, 8, 9, 31, 50}) {
        std::vector<uint32_t> row(count);
        uint64_t expected = 0;
        for (uint32_t& r : row) {
            r = static_cast<uint32_t>(integer(0, kPages - 1));
            for (size_t w = 0; w < kWords; ++w) expected += data[r * kWords + w];
        }
        const uint64_t sum = sum_rows(data, row.data(), count);
        CHECK(sum == expected, "%zu rows sum up to %zu", count, static_cast<size_t>(sum));
    }
    const ReadingSpeeds speeds = measure_reading(size_t{1} << 20, 2, std_threads(2));
    CHECK(speeds.all > 0 && speeds.half > 0, "%g and %g", speeds.all, speeds.half);
}

// Listing and quantising kept channels: every instruction set against plain loops.
#include <cmath>
#include <limits>

#include "check.hpp"
#include "kernels.hpp"

using namespace actsparse;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void test_compact(const Kernels& kernels, size_t begin, size_t end) {
    std::vector<float> x(end), threshold(end);
    for (size_t j = 0; j < end; ++j) {
        const float special[] = {0.0f, -0.0f, kNan, kInfinity, -1.0f};
        x[j] = integer(0, 3) ? uniform(-1, 1) : special[integer(0, 4)];
        threshold[j] = integer(0, 3) ? 0.5f : integer(0, 1) ? 0.0f : std::fabs(x[j]);
    }
    std::vector<uint32_t> row(end - begin + 16);
    std::vector<float> value(end - begin + 16);
    const size_t n = kernels.compact(x.data(), threshold.data(), begin, end, row.data(), value.data());
    size_t i = 0;
    for (size_t j = begin; j < end; ++j) {
        if (std::fabs(x[j]) <= threshold[j]) continue;
        CHECK(i < n && row[i] == j, "%s: entry %zu of [%zu, %zu)", kernels.name, i, begin, end);
        CHECK(value[i] == x[j] || (std::isnan(value[i]) && std::isnan(x[j])), "%s: value %zu", kernels.name, i);
        ++i;
    }
    CHECK(i == n, "%s lists %zu channels of [%zu, %zu), not %zu", kernels.name, n, begin, end, i);
}

void test_quantize(const Kernels& kernels, size_t n, float largest) {
    std::vector<float> value(n), rest(n);
    std::vector<int8_t> quantized(n);
    std::vector<int32_t> pass_sum(n / kPassRows);
    for (float& v : value) v = integer(0, 3) ? uniform(-largest, largest) : 0.0f;
    value[static_cast<size_t>(integer(0, static_cast<int>(n) - 1))] = -largest;
    float scale = -1;
    kernels.quantize(value.data(), n, quantized.data(), &scale, pass_sum.data(), rest.data());
    CHECK(std::fabs(scale - largest / 127) <= 1e-7f * largest, "%s: scale %g of %g", kernels.name, scale, largest);
    for (size_t k = 0; k < n; ++k) {
        const double back = double{scale} * quantized[k];
        CHECK(std::fabs(back - value[k]) <= 0.50001 * scale + 1e-30, "%s: %g becomes %g", kernels.name, value[k], back);
        CHECK(std::fabs(rest[k] - (value[k] - back)) <= 1.2e-7 * largest, "%s: %g leaves %g of %g", kernels.name, back, rest[k],
              value[k]);
    }
    for (size_t pass = 0; pass < n / kPassRows; ++pass) {
        int32_t sum = 0;
        for (size_t k = 0; k < kPassRows; ++k) sum += quantized[pass * kPassRows + k];
        CHECK(pass_sum[pass] == sum, "%s: sum %d, not %d", kernels.name, pass_sum[pass], sum);
    }
}

void test_not_finite(const Kernels& kernels, size_t n, float special) {
    for (size_t position = 0; position < n; ++position) {
        std::vector<float> value(n, 1.0f);
        std::vector<int8_t> quantized(n);
        std::vector<int32_t> pass_sum(n / kPassRows);
        float scale = 0;
        value[position] = special;
        kernels.quantize(value.data(), n, quantized.data(), &scale, pass_sum.data(), nullptr);
        CHECK(std::isnan(scale), "%s: %g at %zu of %zu makes the scale %g", kernels.name, special, position, n, scale);
    }
}

}  // namespace

void test_lists() {
    for (const Kernels* kernels : kernels_to_test()) {
        for (size_t n = 0; n < 70; ++n)
            for (const size_t begin : {size_t{0}, size_t{5}, size_t{32}}) test_compact(*kernels, begin, begin + n);
        for (size_t n = kPassRows; n <= kSegmentRows; n += kPassRows) {
            for (const float largest : {1.0f, 1e-3f, 3e4f, 1e-25f, 1e-29f, 1e30f, 1e-31f, 1e-42f, 0.0f})
                test_quantize(*kernels, n, largest);
            for (const float special : {kNan, kInfinity, -kInfinity}) test_not_finite(*kernels, n, special);
        }
    }
}

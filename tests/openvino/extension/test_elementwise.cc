// Elementwise functions against std::, and 16-bit floating point values against their definition.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "elementwise.hpp"
#include "float16.hpp"

using namespace actsparse;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kDenormal = std::numeric_limits<float>::denorm_min();

double expected(Activation activation, double x) {
    switch (activation) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu_erf: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Activation::gelu_tanh:
            return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
        case Activation::relu: return x < 0 ? 0 : x;
        case Activation::relu_squared: return x < 0 ? 0 : x * x;
    }
    return 0;
}

void test_activation(Activation activation, const char* name) {
    std::vector<float> x{0.0f, -0.0f, kDenormal, -kDenormal, 1e-30f, -1e-30f, 1e30f, 87.0f, 88.0f, 89.0f, 90.0f, -87.0f, -88.0f};
    for (float value = -120; value <= 120; value += 0.37f) x.push_back(value);
    for (int i = 0; i < 1000; ++i) x.push_back(uniform(-8, 8));
    for (size_t n = 0; n < x.size(); n = n < 40 ? n + 1 : x.size() - 1) {
        std::vector<float> hidden(x.begin(), x.begin() + n), gated = hidden, up(n);
        for (float& value : up) value = uniform(-2, 2);
        activate(activation, hidden.data(), nullptr, n);
        activate(activation, gated.data(), up.data(), n);
        for (size_t i = 0; i < n; ++i) {
            const double y = expected(activation, x[i]);
            const double large = std::max(std::fabs(double{x[i]}), std::fabs(y));
            const bool overflows = y > std::numeric_limits<float>::max();
            CHECK(overflows ? hidden[i] == kInfinity : std::fabs(hidden[i] - y) <= 5e-7 * std::max(1.0, large),
                  "%s(%g) = %g, not %g", name, x[i], hidden[i], y);
            CHECK(gated[i] == hidden[i] * up[i], "%s(%g) * %g = %g", name, x[i], up[i], gated[i]);
        }
        if (n == x.size() - 1) break;
    }
    for (size_t position = 0; position < 40; ++position) {
        std::vector<float> hidden(40, 1.0f);
        hidden[position] = kNan;
        activate(activation, hidden.data(), nullptr, hidden.size());
        for (size_t i = 0; i < hidden.size(); ++i)
            CHECK(std::isnan(hidden[i]) == (i == position), "%s at %zu with a NaN at %zu", name, i, position);
    }
    std::vector<float> infinite(20, kInfinity);
    activate(activation, infinite.data(), nullptr, infinite.size());
    for (const float y : infinite) CHECK(y == kInfinity, "%s(inf) = %g", name, y);
}

void test_mask(size_t n) {
    std::vector<float> x(n), threshold(n), y(n, 7.0f);
    const float special[] = {0.0f, -0.0f, kNan, kInfinity, -kInfinity, kDenormal, 0.5f, -0.5f};
    for (size_t i = 0; i < n; ++i) {
        x[i] = integer(0, 1) ? special[integer(0, 7)] : uniform(-1, 1);
        threshold[i] = integer(0, 2) == 0 ? 0.0f : integer(0, 9) == 0 ? kInfinity : 0.5f;
    }
    mask(x.data(), threshold.data(), n, y.data());
    for (size_t i = 0; i < n; ++i) {
        const float right = std::fabs(x[i]) <= threshold[i] ? 0.0f : x[i];
        CHECK(y[i] == right || (std::isnan(y[i]) && std::isnan(right)), "mask(%g, %g) = %g", x[i], threshold[i], y[i]);
    }
}

void test_sums(size_t n) {
    std::vector<float> x(n), scale(n), zero(n), y(n), sum(n);
    for (size_t i = 0; i < n; ++i) {
        x[i] = uniform(-100, 100);
        scale[i] = uniform(0, 1);
        zero[i] = static_cast<float>(integer(0, 255));
        sum[i] = uniform(-100, 100);
    }
    scale_outputs(x.data(), scale.data(), zero.data(), 0.5f, 0.37f, n, y.data());
    for (size_t i = 0; i < n; ++i) {
        const double right = double{scale[i]} * (x[i] - (double{zero[i]} - 0.5) * 0.37f);
        CHECK(std::fabs(y[i] - right) <= 5e-5, "scale_outputs gives %g, not %g", y[i], right);
    }
    const std::vector<float> before = sum;
    add(x.data(), n, sum.data());
    for (size_t i = 0; i < n; ++i) CHECK(sum[i] == before[i] + x[i], "%g + %g = %g", before[i], x[i], sum[i]);
}

}  // namespace

void test_elementwise() {
    const char* const names[] = {"silu", "gelu_erf", "gelu_tanh", "relu", "relu_squared"};
    for (const char* name : names) test_activation(activation_of(name), name);
    for (size_t n = 0; n < 40; ++n) {
        test_mask(n);
        test_sums(n);
    }
    bool is_refused = false;
    try {
        activation_of("swish");
    } catch (const std::invalid_argument& error) {
        is_refused = std::string(error.what()).find("silu, gelu_erf") != std::string::npos;
    }
    CHECK(is_refused, "an unknown activation must be refused with the list of known ones");
}

void test_float16() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 1023);
        const double sign = bits & 0x8000 ? -1 : 1;
        const float value = from_f16(static_cast<uint16_t>(bits));
        CHECK(std::signbit(value) == (sign < 0), "from_f16(%x) = %g", bits, value);
        if (exponent == 31)
            CHECK(fraction ? std::isnan(value) : std::isinf(value), "from_f16(%x) = %g", bits, value);
        else
            CHECK(value == sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24)),
                  "from_f16(%x) = %g", bits, value);
    }
    CHECK(from_bf16(0xbfc0) == -1.5f, "from_bf16(-1.5) = %g", from_bf16(0xbfc0));
}

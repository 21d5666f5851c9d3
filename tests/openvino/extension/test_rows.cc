// multiply_rows: all weight types, modes, instruction sets and thread counts against double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "check.hpp"
#include "float16.hpp"
#include "rows.hpp"

using namespace actsparse;

namespace {

constexpr double kOrderError = 1e-6;

struct RowShape {
    WeightType type;
    size_t in, out;
    size_t group = 0;  // u4
    bool is_scale_f16 = false;
};

// Every buffer is exactly as long as it must be, so that the address sanitizer sees a read past its end.
struct RandomRows {
    RowShape shape;
    size_t padded;
    std::vector<uint8_t> data, zero_u8;
    std::vector<float> scale, zero, threshold;
    std::vector<uint16_t> scale_f16;
    std::vector<double> weight, magnitude;  // [out][in]

    explicit RandomRows(const RowShape& s) : shape(s), padded((s.in + kRowLine - 1) / kRowLine * kRowLine) {
        weight.resize(s.out * s.in);
        magnitude.resize(s.out * s.in);
        for (size_t j = 0; j < s.out; ++j) threshold.push_back(uniform(0.0f, 2.0f));
        if (s.type == WeightType::u8) make_u8();
        else if (s.type == WeightType::u4) make_u4();
        else make_half();
    }

    RowWeights weights() const {
        const void* scales = shape.is_scale_f16 ? static_cast<const void*>(scale_f16.data()) : scale.data();
        const void* zeros = shape.type == WeightType::u4 ? static_cast<const void*>(zero_u8.data()) : zero.data();
        const size_t group = shape.type == WeightType::u4 ? shape.group : padded;
        return {shape.type, padded, shape.out, group, data.data(), scales, shape.is_scale_f16, zeros};
    }

private:
    void make_u8() {
        for (size_t j = 0; j < shape.out; ++j) {
            scale.push_back(uniform(0.001f, 0.02f));
            zero.push_back(static_cast<float>(integer(0, 255)));
            for (size_t k = 0; k < padded; ++k) {
                const int value = integer(0, 4) ? integer(0, 255) : 255;
                data.push_back(static_cast<uint8_t>(value));
                if (k < shape.in) set(j, k, value, double{zero[j]}, scale[j]);
            }
        }
    }
    void make_u4() {
        const size_t groups = shape.in / shape.group;
        data.resize(shape.out * padded / 2);
        for (size_t j = 0; j < shape.out; ++j)
            for (size_t g = 0; g < groups; ++g) {
                const auto half = static_cast<uint16_t>(integer(0x1400, 0x2400));
                const float s = shape.is_scale_f16 ? from_f16(half) : uniform(0.001f, 0.02f);
                if (shape.is_scale_f16) scale_f16.push_back(half);
                else scale.push_back(s);
                zero_u8.push_back(static_cast<uint8_t>(integer(0, 15)));
                for (size_t k = g * shape.group; k < (g + 1) * shape.group; ++k) {
                    const int value = integer(0, 15);
                    uint8_t& both = data[j * padded / 2 + k / 64 * 32 + k % 32];
                    both = static_cast<uint8_t>(both | value << (k % 64 < 32 ? 0 : 4));
                    set(j, k, value, zero_u8.back(), s);
                }
            }
    }
    void make_half() {
        data.resize(shape.out * padded * 2);
        for (size_t j = 0; j < shape.out; ++j)
            for (size_t k = 0; k < padded; ++k) {
                const bool is_f16 = shape.type == WeightType::f16;
                const auto bits = static_cast<uint16_t>((is_f16 ? integer(0, 0x4000) : integer(0x3c00, 0x4000)) |
                                                        (integer(0, 1) ? 0x8000 : 0));
                std::memcpy(&data[2 * (j * padded + k)], &bits, sizeof bits);
                if (k < shape.in) set(j, k, is_f16 ? from_f16(bits) : from_bf16(bits), 0, 1);
            }
    }
    void set(size_t j, size_t k, double value, double zero_point, double factor) {
        weight[j * shape.in + k] = (value - zero_point) * factor;
        magnitude[j * shape.in + k] = (value + zero_point) * factor;
    }
};

const char* const kTypes[] = {"u8", "u4", "f16", "bf16"};

// What a row times a token's input is, and what bounds the error of it.
struct Expected {
    double sum = 0, magnitude = 0, weight_sum = 0, norm = 0, largest = 0;
};

std::vector<Expected> compute_expected(const RandomRows& rows, const std::vector<float>& x, size_t tokens) {
    const size_t in = rows.shape.in, out = rows.shape.out;
    std::vector<Expected> expected(tokens * out);
    for (size_t t = 0; t < tokens; ++t)
        for (size_t j = 0; j < out; ++j) {
            Expected& e = expected[t * out + j];
            for (size_t k = 0; k < in; ++k) {
                const double w = rows.weight[j * in + k], v = x[t * in + k];
                e.sum += w * v;
                e.magnitude += std::fabs(rows.magnitude[j * in + k] * v);
                e.weight_sum += std::fabs(w);
                e.norm += w * w;
                e.largest = std::max(e.largest, std::fabs(v));
            }
        }
    return expected;
}

void test_shape(const RandomRows& rows, size_t tokens) {
    const RowShape& shape = rows.shape;
    const bool is_integer = shape.type == WeightType::u8 || shape.type == WeightType::u4;
    std::vector<float> x(tokens * shape.in), gate(tokens * shape.out);
    for (float& value : x) value = uniform(-3, 3);
    for (float& value : gate) value = uniform(-3, 3);
    const std::vector<Expected> expected = compute_expected(rows, x, tokens);
    for (const bool is_exact : {false, true})
        for (const Kernels* kernels : kernels_to_test())
            for (size_t threads = 1; threads <= 3; ++threads) {
                std::vector<float> y = gate;
                std::thread([&] {
                    multiply_rows(rows.weights(), rows.threshold.data(), is_exact, x.data(), shape.in, tokens, y.data(),
                                  *kernels, std_threads(threads));
                }).join();
                double squares = 0, expected_squares = 0;
                for (size_t t = 0; t < tokens; ++t)
                    for (size_t j = 0; j < shape.out; ++j) {
                        const float g = gate[t * shape.out + j], found = y[t * shape.out + j];
                        const auto& [sum, magnitude, weight_sum, norm, largest] = expected[t * shape.out + j];
                        if (std::fabs(g) <= rows.threshold[j]) {
                            CHECK(found == 0, "a masked row gives %g", found);
                            continue;
                        }
                        const double half_step = !is_integer ? 0 : is_exact ? largest / 254 / 254 / 254 : largest / 254;
                        const double bound = std::fabs(g) * (half_step * weight_sum * 1.001 + 2 * kOrderError * magnitude) + 1e-30;
                        const double error = found - g * sum;
                        CHECK(std::fabs(error) <= bound, "%s %zu x %zu, %s, %s: row %zu of token %zu is %g, not %g (+- %g)",
                              kTypes[static_cast<int>(shape.type)], shape.in, shape.out, kernels->name,
                              is_exact ? "exact" : "fast", j, t, found, g * sum, bound);
                        squares += error * error;
                        expected_squares += g * g * (half_step * half_step / 3 * norm + std::pow(kOrderError * magnitude, 2));
                    }
                CHECK(squares <= 9 * expected_squares, "%s %zu x %zu, %s: error %g, expected %g",
                      kTypes[static_cast<int>(shape.type)], shape.in, shape.out, kernels->name, std::sqrt(squares),
                      std::sqrt(expected_squares));
            }
}

}  // namespace

void test_rows() {
    const auto u8 = WeightType::u8, u4 = WeightType::u4, f16 = WeightType::f16, bf16 = WeightType::bf16;
    for (const RowShape& shape : {RowShape{u8, 1, 1}, RowShape{u8, 64, 70}, RowShape{u8, 200, 33}, RowShape{u8, 577, 9},
                                  RowShape{f16, 5, 3}, RowShape{f16, 130, 40}, RowShape{bf16, 65, 17},
                                  RowShape{u4, 64, 9, 64}, RowShape{u4, 256, 40, 128}, RowShape{u4, 192, 21, 64, true}}) {
        const RandomRows rows(shape);
        for (const size_t tokens : {0, 1, 2, 16, 33, 65})
            if (!is_hurried || tokens == 1 || tokens == 33) test_shape(rows, tokens);
    }
    // A value that is not finite spoils its own token and no other one, and where the gate is none, the row runs.
    const float kNan = std::numeric_limits<float>::quiet_NaN();
    for (const RowShape& shape : {RowShape{u8, 70, 5}, RowShape{f16, 70, 5}, RowShape{u4, 64, 5, 64}}) {
        const RandomRows rows(shape);
        for (const Kernels* kernels : kernels_to_test())
            for (const size_t tokens : {2, 17}) {
            std::vector<float> x(tokens * shape.in, 1.0f), gate(tokens * shape.out, 3.0f);
            x[3] = kNan;
            gate[shape.out] = kNan;
            multiply_rows(rows.weights(), rows.threshold.data(), false, x.data(), shape.in, tokens, gate.data(), *kernels,
                          std_threads(2));
            for (size_t j = 0; j < shape.out; ++j) {
                CHECK(!std::isfinite(gate[j]), "NaN becomes %g", gate[j]);
                CHECK(std::isfinite(gate[shape.out + j]) == (j > 0), "row %zu of the other token is %g", j, gate[shape.out + j]);
            }
        }
    }
}

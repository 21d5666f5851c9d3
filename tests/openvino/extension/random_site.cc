#include "random_site.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

#include "check.hpp"
#include "float16.hpp"

using namespace actsparse;

std::string Shape::name() const {
    const char* const types[] = {"u8", "u4", "f16", "bf16"};
    std::string text = std::string(types[static_cast<int>(type)]) + " " + std::to_string(in) + " ->";
    for (const size_t out : out_features) text += " " + std::to_string(out);
    return type == WeightType::u4 ? text + " by " + std::to_string(group) + (is_scale_f16 ? " f16" : " f32") : text;
}

size_t Shape::out() const { return std::accumulate(out_features.begin(), out_features.end(), size_t{0}); }

RandomSite::RandomSite(const Shape& s) : shape(s), threshold(s.in) {
    const size_t multiple = shape.type == WeightType::u4 ? 128 : 64;
    padded = (shape.out() + multiple - 1) / multiple * multiple;
    weight.resize(shape.out() * shape.in);
    magnitude.resize(shape.out() * shape.in);
    if (shape.type == WeightType::u8)
        make_u8();
    else if (shape.type == WeightType::u4)
        make_u4();
    else
        make_half();
    // Every other site.
    static size_t count = 0;
    if (count++ % 2)
        for (size_t o = 0; o < shape.out(); ++o) bias.push_back(uniform(-1, 1));
}

double& RandomSite::at(std::vector<double>& values, size_t output, size_t input) const {
    static double padding;  // outputs that nobody reads
    return output < shape.out() ? values[output * shape.in + input] : padding;
}

namespace {

// The output in a line of 64 whose weight is at `byte`: 16 l + 4 v + d holds output 16 v + 4 l + d.
size_t output_at(size_t byte) {
    const size_t l = byte / 16, v = byte / 4 % 4, d = byte % 4;
    return 16 * v + 4 * l + d;
}

}  // namespace

void RandomSite::make_u8() {
    m_data.resize(padded * shape.in);
    for (size_t o = 0; o < padded; ++o) {
        m_scale.push_back(uniform(0.001f, 0.02f));
        m_zero.push_back(static_cast<float>(integer(0, 255)));
    }
    size_t position = 0;
    for (size_t panel = 0; panel < padded; panel += 1024)
        for (size_t j = 0; j < shape.in; ++j)
            for (size_t line = panel; line < std::min(padded, panel + 1024); line += 64)
                for (size_t byte = 0; byte < 64; ++byte) {
                    const size_t o = line + output_at(byte);
                    const int value = integer(0, 4) ? integer(0, 255) : 255;
                    m_data[position++] = static_cast<uint8_t>(value);
                    at(weight, o, j) = (value - double{m_zero[o]}) * m_scale[o];
                    at(magnitude, o, j) = (value + double{m_zero[o]}) * m_scale[o];
                }
}

void RandomSite::make_u4() {
    const size_t groups = shape.in / shape.group;
    std::vector<double> scale(groups * padded);
    for (double& s : scale) {
        const auto half = static_cast<uint16_t>(integer(0x1400, 0x2400));
        const float value = shape.is_scale_f16 ? from_f16(half) : uniform(0.001f, 0.02f);
        if (shape.is_scale_f16)
            m_scale_f16.push_back(half);
        else
            m_scale.push_back(value);
        s = value;
        m_zero_u8.push_back(static_cast<uint8_t>(integer(0, 15)));
    }
    m_data.resize(padded * shape.in / 2);
    size_t position = 0;
    for (size_t panel = 0; panel < padded; panel += 2048)
        for (size_t j = 0; j < shape.in; ++j)
            for (size_t line = panel; line < std::min(padded, panel + 2048); line += 128)
                for (size_t byte = 0; byte < 64; ++byte) {
                    const int nibbles[2] = {integer(0, 15), integer(0, 15)};
                    m_data[position++] = static_cast<uint8_t>(nibbles[0] | nibbles[1] << 4);
                    for (size_t half = 0; half < 2; ++half) {
                        const size_t o = line + 64 * half + output_at(byte), index = j / shape.group * padded + o;
                        const double zero = m_zero_u8[index];
                        at(weight, o, j) = (nibbles[half] - zero) * scale[index];
                        at(magnitude, o, j) = (nibbles[half] + zero) * scale[index];
                    }
                }
}

void RandomSite::make_half() {
    m_data.resize(padded * shape.in * 2);
    size_t position = 0;
    for (size_t panel = 0; panel < padded; panel += 512)
        for (size_t j = 0; j < shape.in; ++j)
            for (size_t o = panel; o < std::min(padded, panel + 512); ++o, position += 2) {
                // Of either sign, from denormals to 2 (f16), and from 2^-7 to 2 (bf16).
                const bool is_f16 = shape.type == WeightType::f16;
                const auto bits = static_cast<uint16_t>((is_f16 ? integer(0, 0x4000) : integer(0x3c00, 0x4000)) |
                                                        (integer(0, 1) ? 0x8000 : 0));
                std::memcpy(&m_data[position], &bits, sizeof bits);
                at(weight, o, j) = is_f16 ? from_f16(bits) : from_bf16(bits);
                at(magnitude, o, j) = std::fabs(at(weight, o, j));
            }
}

Site RandomSite::site(bool is_exact) const {
    const bool is_u4 = shape.type == WeightType::u4;
    const void* scale = shape.is_scale_f16 ? static_cast<const void*>(m_scale_f16.data()) : m_scale.data();
    const void* zero = is_u4 ? static_cast<const void*>(m_zero_u8.data()) : m_zero.data();
    return {{shape.type, shape.in, padded, is_u4 ? shape.group : shape.in, m_data.data(), scale, shape.is_scale_f16,
             zero},
            threshold.data(),
            is_exact,
            bias.empty() ? nullptr : bias.data()};
}

Site RandomSite::packed_site(bool is_exact) const {
    Site packed = site(is_exact);
    packed.weights = m_packed.pack(packed.weights, std_threads(2));
    return packed;
}

Reference compute_reference(const RandomSite& site, const std::vector<float>& x, size_t tokens) {
    const size_t in = site.shape.in, out = site.shape.out();
    Reference reference;
    for (size_t t = 0; t < tokens; ++t) {
        double largest = 0;
        std::vector<size_t> kept;
        for (size_t j = 0; j < in; ++j)
            if (!(std::fabs(x[t * in + j]) <= site.threshold[j])) {
                kept.push_back(j);
                largest = std::max(largest, std::fabs(double{x[t * in + j]}));
            }
        reference.largest.push_back(largest);
        for (size_t o = 0; o < out; ++o) {
            double y = site.bias.empty() ? 0.0 : site.bias[o], magnitude = std::fabs(y), sum = 0, norm = 0;
            for (const size_t j : kept) {
                const double value = x[t * in + j], weight = site.weight[o * in + j];
                y += value * weight;
                magnitude += std::fabs(value) * site.magnitude[o * in + j];
                sum += std::fabs(weight);
                norm += weight * weight;
            }
            reference.y.push_back(y);
            reference.magnitude.push_back(magnitude);
            reference.weight_sum.push_back(sum);
            reference.weight_norm.push_back(norm);
        }
    }
    return reference;
}

std::vector<float> compute(const Site& site, const Shape& shape, const std::vector<float>& x, size_t tokens,
                           const Kernels& kernels, size_t threads) {
    const size_t out = shape.out();
    std::vector<std::vector<float>> layers;
    std::vector<Output> outputs;
    size_t begin = 0;
    for (const size_t features : shape.out_features) layers.emplace_back(tokens * features, 1e30f);
    for (size_t i = 0; i < layers.size(); ++i) {
        outputs.push_back({layers[i].data(), begin, begin + shape.out_features[i]});
        begin += shape.out_features[i];
    }
    std::thread([&] {
        multiply_site(site, x.data(), tokens, outputs, kernels, std_threads(threads));
    }).join();
    std::vector<float> y(tokens * out);
    for (size_t t = 0; t < tokens; ++t)
        for (size_t i = 0; i < layers.size(); ++i) {
            const size_t features = shape.out_features[i];
            std::copy_n(layers[i].data() + t * features, features, y.data() + t * out + outputs[i].begin);
        }
    return y;
}

// Sites with random weights, packed as weights.hpp says, and what they must compute.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "packed_weights.hpp"
#include "site.hpp"

struct Shape {
    actsparse::WeightType type;
    size_t in;
    std::vector<size_t> out_features;  // of each layer
    size_t group = 0;                  // u4
    bool is_scale_f16 = false;         // u4

    std::string name() const;
    bool is_integer() const { return type == actsparse::WeightType::u8 || type == actsparse::WeightType::u4; }
    size_t out() const;                // of all layers, not padded
};

// Every buffer is exactly as long as it must be, so that the address sanitizer sees a read past its end.
struct RandomSite {
    explicit RandomSite(const Shape& shape);
    actsparse::Site site(bool is_exact) const;         // as it is saved
    actsparse::Site packed_site(bool is_exact) const;  // as it is read

    Shape shape;
    size_t padded;
    std::vector<float> threshold;      // [in]
    std::vector<float> bias;           // [out], or nothing
    std::vector<double> weight;        // [out][in], as the kernels understand the packed ones
    std::vector<double> magnitude;     // [out][in]: of the numbers that make up a weight, before they cancel

private:
    void make_u8();
    void make_u4();
    void make_half();
    double& at(std::vector<double>& values, size_t output, size_t input) const;

    std::vector<uint8_t> m_data, m_zero_u8;
    std::vector<float> m_scale, m_zero;
    std::vector<uint16_t> m_scale_f16;
    actsparse::PackedWeights m_packed;
};

// What a site must compute for x [tokens][in], in double precision.
struct Reference {
    std::vector<double> y;             // [tokens][out]
    std::vector<double> magnitude;     // [tokens][out]: sum of the absolute values of all terms; bounds float errors
    std::vector<double> weight_sum;    // [tokens][out]: sum of the absolute values of the weights in use
    std::vector<double> weight_norm;   // [tokens][out]: sum of their squares
    std::vector<double> largest;       // [tokens]: largest kept |x|
};
Reference compute_reference(const RandomSite& site, const std::vector<float>& x, size_t tokens);

// The same by the kernels, in a new thread, whose scratch memory is as short as it can be: [tokens][out].
std::vector<float> compute(const actsparse::Site& site, const Shape& shape, const std::vector<float>& x, size_t tokens,
                           const actsparse::Kernels& kernels, size_t threads);

#include "elementwise.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace actsparse {
namespace {

// e^x to 2e-7, without a branch or a call, so that loops over it are vectorised. x is clamped to [-87, 88].
inline __attribute__((always_inline)) float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const float shifted = x * 1.44269504f + rounder;
    const float n = shifted - rounder;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    // Minimax polynomial of Cephes' expf.
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits, exponent;  // unsigned: shifting negative numbers is undefined
    std::memcpy(&exponent, &shifted, sizeof exponent);
    std::memcpy(&bits, &p, sizeof bits);
    bits += (exponent - 0x4b400000u) << 23;
    std::memcpy(&p, &bits, sizeof p);
    return p;
}

inline __attribute__((always_inline)) float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
inline __attribute__((always_inline)) float error_function(float x) {
    const float a = std::fabs(x), t = 1.0f / (1.0f + 0.3275911f * a);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float y = 1.0f - p * exponential(-a * a);
    return x < 0 ? -y : y;
}

// A NaN clamps to a number in exponential(): x itself carries it into the result.
CLONES void silu(float* h, size_t n) {
    for (size_t i = 0; i < n; ++i) h[i] = h[i] * sigmoid(h[i]);
}
CLONES void gelu_tanh(float* h, size_t n) {
    for (size_t i = 0; i < n; ++i) h[i] = h[i] * sigmoid(1.5957691216f * (h[i] + 0.044715f * h[i] * h[i] * h[i]));
}
CLONES void gelu_erf(float* h, size_t n) {
    for (size_t i = 0; i < n; ++i) h[i] = 0.5f * h[i] * (1.0f + error_function(h[i] * 0.70710678f));
}
CLONES void relu(float* h, size_t n) {
    for (size_t i = 0; i < n; ++i) h[i] = h[i] < 0 ? 0.0f : h[i];
}
CLONES void relu_squared(float* h, size_t n) {
    for (size_t i = 0; i < n; ++i) h[i] = h[i] < 0 ? 0.0f : h[i] * h[i];
}
CLONES void multiply_by(float* h, const float* up, size_t n) {
    for (size_t i = 0; i < n; ++i) h[i] *= up[i];
}

}  // namespace

CLONES void mask(const float* x, const float* threshold, size_t n, float* y) {
    for (size_t i = 0; i < n; ++i) y[i] = std::fabs(x[i]) <= threshold[i] ? 0.0f : x[i];
}
CLONES void mask_and_note(const float* threshold, size_t n, uint32_t bit, float* x, uint32_t* kept) {
    for (size_t i = 0; i < n; ++i) {
        const bool is_small = std::fabs(x[i]) <= threshold[i];
        x[i] = is_small ? 0.0f : x[i];
        kept[i] |= is_small ? 0u : bit;
    }
}
CLONES void note_kept(const float* x, const float* threshold, size_t n, float* kept) {
    for (size_t i = 0; i < n; ++i) kept[i] = std::fabs(x[i]) <= threshold[i] ? kept[i] : 1.0f;
}
CLONES void scale_outputs(const float* x, const float* scale, const float* zero, float middle, float sum, size_t n, float* y) {
    for (size_t i = 0; i < n; ++i) y[i] = scale[i] * (x[i] - (zero[i] - middle) * sum);
}
CLONES void add(const float* x, size_t n, float* y) {
    for (size_t i = 0; i < n; ++i) y[i] += x[i];
}

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::silu;
    if (name == "gelu_erf") return Activation::gelu_erf;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "relu") return Activation::relu;
    if (name == "relu_squared") return Activation::relu_squared;
    throw std::invalid_argument(
        "actsparse: activation must be silu, gelu_erf, gelu_tanh, relu or relu_squared, not '" + name + "'");
}

void activate(Activation activation, float* hidden, const float* up, size_t n) {
    switch (activation) {
        case Activation::silu: silu(hidden, n); break;
        case Activation::gelu_erf: gelu_erf(hidden, n); break;
        case Activation::gelu_tanh: gelu_tanh(hidden, n); break;
        case Activation::relu: relu(hidden, n); break;
        case Activation::relu_squared: relu_squared(hidden, n); break;
    }
    if (up) multiply_by(hidden, up, n);
}

}  // namespace actsparse

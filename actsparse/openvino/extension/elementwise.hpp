// Loops over single values, compiled for several instruction sets; the best is chosen when the library is loaded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace actsparse {

enum class Activation { silu, gelu_erf, gelu_tanh, relu, relu_squared };

// The activation of that name, or an std::invalid_argument that lists the names.
Activation activation_of(const std::string& name);

// hidden[i] = f(hidden[i]), times up[i] where `up` is not null.
void activate(Activation activation, float* hidden, const float* up, size_t n);

// y[i] = 0 where |x[i]| <= threshold[i], else x[i] (a NaN stays).
void mask(const float* x, const float* threshold, size_t n, float* y);

// x[i] = 0 where |x[i]| <= threshold[i]; elsewhere (a NaN too) kept[i] |= bit.
void mask_and_note(const float* threshold, size_t n, uint32_t bit, float* x, uint32_t* kept);

// kept[i] = 1 where |x[i]| > threshold[i] (or a NaN), else as it was.
void note_kept(const float* x, const float* threshold, size_t n, float* kept);

// y[i] = scale[i] * (x[i] - (zero[i] - middle) * sum).
void scale_outputs(const float* x, const float* scale, const float* zero, float middle, float sum, size_t n, float* y);

// y[i] += x[i].
void add(const float* x, size_t n, float* y);

}  // namespace actsparse

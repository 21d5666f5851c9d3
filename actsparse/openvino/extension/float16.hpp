// Conversion of 16-bit floating point values without instructions for it.
#pragma once

#include <cstdint>
#include <cstring>

namespace actsparse {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bf16(uint16_t half) { return from_bits(uint32_t{half} << 16); }

inline float from_f16(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // The exponent of f16 is 112 below that of f32; multiplying scales it up, denormals included.
    const float value = from_bits(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
}

}  // namespace actsparse

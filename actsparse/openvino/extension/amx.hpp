// What the kernels for AMX have in common: the shapes of tiles.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace actsparse {

// The first layout of LDTILECFG.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

}  // namespace actsparse

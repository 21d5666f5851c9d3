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

// Give tiles 0 to 5 so many rows, and the two others all they have.
__attribute__((target("amx-tile"), always_inline)) inline void configure_tiles(size_t rows) {
    TileConfig config;
    for (size_t tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : 16);
    }
    _tile_loadconfig(&config);
}

}  // namespace actsparse

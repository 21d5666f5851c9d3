#include "packed_weights.hpp"

#include <algorithm>
#include <cstring>

namespace actsparse {
namespace {

// Rows that a thread copies at a time.
constexpr size_t kChunkRows = 64;

// Copy rows [begin, end) of one panel, which takes in several saved ones.
void copy_rows(const Weights& saved, const Weights& packed, size_t panel, size_t begin, size_t end, uint8_t* to) {
    const size_t many = packed.panel_bytes / saved.panel_bytes, first = panel * many;
    const size_t last = std::min(first + many, saved.panels()), row_bytes = packed.row_bytes(panel);
    for (size_t row = begin; row < end; ++row) {
        uint8_t* at = to + row * row_bytes;
        for (size_t p = first; p < last; ++p) {
            const size_t bytes = saved.row_bytes(p);
            std::memcpy(at, saved.panel_data(p) + row * bytes, bytes);
            at += bytes;
        }
    }
}

}  // namespace

template <typename Copy>
const uint8_t* PackedWeights::copy_once(const uint8_t* saved, size_t bytes, Copy&& copy) const {
    std::call_once(m_once, [&] {
        uint8_t* data = m_pages.allocate(bytes);
        if (!data) return;
        copy(data);
        release_file_pages(saved, bytes);
        m_data = data;
    });
    return m_data;
}

Weights PackedWeights::pack(const Weights& saved, const Threads& threads) const {
    static_assert(kPageBytes % kSavedRowBytes == 0);
    Weights packed = saved;
    packed.panel_bytes = kPageBytes;
    const size_t chunks = (packed.in + kChunkRows - 1) / kChunkRows;
    const uint8_t* data = copy_once(saved.data, saved.bytes(), [&](uint8_t* to) {
        threads.run(packed.panels() * chunks, [&](size_t task) {
            const size_t panel = task / chunks, begin = task % chunks * kChunkRows;
            copy_rows(saved, packed, panel, begin, std::min(packed.in, begin + kChunkRows),
                      to + panel * packed.in * packed.panel_bytes);
        });
    });
    if (!data) return saved;
    packed.data = data;
    return packed;
}

RowWeights PackedWeights::pack(const RowWeights& saved, const Threads& threads) const {
    const size_t bytes = saved.out * saved.row_bytes(), chunk = kChunkRows * saved.row_bytes();
    const uint8_t* data = copy_once(saved.data, bytes, [&](uint8_t* to) {
        threads.run((bytes + chunk - 1) / chunk, [&](size_t task) {
            const size_t begin = task * chunk;
            std::memcpy(to + begin, saved.data + begin, std::min(chunk, bytes - begin));
        });
    });
    RowWeights packed = saved;
    if (data) packed.data = data;
    return packed;
}

}  // namespace actsparse

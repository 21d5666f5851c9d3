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

// Transpose up to kChunkRows inputs, from `begin` on, of one panel's u8 weights.
void transpose_rows(const uint8_t* plain, size_t outputs, uint8_t flip, const Weights& packed, size_t panel, size_t begin,
                    size_t end, uint8_t* to) {
    const size_t row_bytes = packed.row_bytes(panel), first = panel * packed.panel_outputs();
    for (size_t at = 0; at < row_bytes; at += kLineBytes)
        for (size_t byte = 0; byte < kLineBytes; ++byte) {
            const size_t output = first + at + byte % 16 / 4 * 16 + byte / 16 * 4 + byte % 4;  // see weights.hpp
            uint8_t* column = to + at + byte;
            const uint8_t* from = plain + output * packed.in;
            for (size_t row = begin; row < end; ++row)
                column[row * row_bytes] = output < outputs ? from[row] ^ flip : 0;
        }
}

}  // namespace

template <typename Copy>
const uint8_t* PackedWeights::copy_once(const uint8_t* saved, size_t saved_bytes, size_t bytes, Copy&& copy) const {
    std::call_once(m_once, [&] {
        uint8_t* data = m_pages.allocate(bytes);
        if (!data) return;
        copy(data);
        release_file_pages(saved, saved_bytes);
        m_data = data;
    });
    return m_data;
}

Weights PackedWeights::pack(const Weights& saved, const Threads& threads) const {
    static_assert(kPageBytes % kSavedRowBytes == 0);
    Weights packed = saved;
    packed.panel_bytes = kPageBytes;
    const size_t chunks = (packed.in + kChunkRows - 1) / kChunkRows;
    const uint8_t* data = copy_once(saved.data, saved.bytes(), saved.bytes(), [&](uint8_t* to) {
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

Weights PackedWeights::pack_plain(const Weights& form, const uint8_t* plain, size_t outputs, bool is_signed,
                                  const Threads& threads) const {
    Weights packed = form;
    packed.panel_bytes = kPageBytes;
    const size_t chunks = (packed.in + kChunkRows - 1) / kChunkRows;
    const uint8_t flip = is_signed ? kMiddle : 0;
    packed.data = copy_once(plain, packed.in * outputs, packed.bytes(), [&](uint8_t* to) {
        threads.run(packed.panels() * chunks, [&](size_t task) {
            const size_t panel = task / chunks, begin = task % chunks * kChunkRows;
            transpose_rows(plain, outputs, flip, packed, panel, begin, std::min(packed.in, begin + kChunkRows),
                           to + panel * packed.in * packed.panel_bytes);
        });
    });
    return packed;
}

RowWeights PackedWeights::pack(const RowWeights& saved, const Threads& threads) const {
    const size_t bytes = saved.out * saved.row_bytes(), chunk = kChunkRows * saved.row_bytes();
    const uint8_t* data = copy_once(saved.data, bytes, bytes, [&](uint8_t* to) {
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

// Fetching of rows that will be needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weights.hpp"

namespace actsparse {

// Fetches rows into the second-level cache one after another, a line at a time, while earlier ones are multiplied.
class Fetcher {
public:
    Fetcher(const uint8_t* data, size_t row_bytes, size_t bytes, const uint32_t* row, size_t rows)
        : m_data(data), m_row_bytes(row_bytes), m_bytes(bytes), m_row(row), m_end(row + rows) {
        start_row();
    }
    void fetch() {
        if (m_row == m_end) return;
        __builtin_prefetch(m_from, 0, 2);
        m_from += kLineBytes;
        if (m_from == m_to) {
            ++m_row;
            start_row();
        }
    }

private:
    void start_row() {
        if (m_row == m_end) return;
        m_from = m_data + *m_row * m_row_bytes;
        m_to = m_from + m_bytes;
    }

    const uint8_t* m_data;
    size_t m_row_bytes, m_bytes;
    const uint32_t *m_row, *m_end;
    const uint8_t *m_from = nullptr, *m_to = nullptr;
};

}  // namespace actsparse

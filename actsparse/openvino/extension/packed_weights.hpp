// Weights laid out for this machine, from the order that they are saved in.
#pragma once

#include <mutex>

#include "pages.hpp"
#include "rows.hpp"
#include "threads.hpp"
#include "weights.hpp"

namespace actsparse {

// The weights of one site of one operation, copied when they are first asked for. Several threads may ask at a time.
class PackedWeights {
public:
    // The same weights, with rows of up to a page. Without memory for them, the saved ones.
    Weights pack(const Weights& saved, const Threads& threads) const;
    // Weights that are saved in OpenVINO's own order, [outputs][inputs] with as many outputs as that; with a sign, each
    // is taken 128 higher. Without memory for them, none. `form` tells the rest.
    Weights pack_plain(const Weights& form, const uint8_t* plain, size_t outputs, bool is_signed,
                       const Threads& threads) const;
    // The same rows, in pages of their own.
    RowWeights pack(const RowWeights& saved, const Threads& threads) const;

private:
    template <typename Copy>
    const uint8_t* copy_once(const uint8_t* saved, size_t saved_bytes, size_t bytes, Copy&& copy) const;

    mutable std::once_flag m_once;
    mutable Pages m_pages;
    mutable const uint8_t* m_data = nullptr;
};

}  // namespace actsparse

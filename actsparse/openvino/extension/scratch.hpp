// Scratch memory that lives as long as its thread.
#pragma once

#include <cstddef>
#include <vector>

namespace actsparse {

// Room for n elements: vectors of scratch memory only ever grow.
template <typename T>
T* grow(std::vector<T>& vector, size_t n) {
    if (vector.size() < n) vector.resize(n);
    return vector.data();
}

}  // namespace actsparse

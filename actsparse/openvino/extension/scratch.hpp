// Scratch memory that lives as long as its thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace actsparse {

// Room for n elements: vectors of scratch memory only ever grow.
template <typename T>
T* grow(std::vector<T>& vector, size_t n) {
    if (vector.size() < n) vector.resize(n);
    return vector.data();
}

// The first place in it that begins a line of the cache.
template <typename T>
T* align(T* data) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data) + 63) / 64 * 64);
}

}  // namespace actsparse

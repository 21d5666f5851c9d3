#include "pages.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#else
#include <new>
#endif

#include "weights.hpp"

namespace actsparse {

#if defined(__linux__)

constexpr size_t kHugeBytes = size_t{2} << 20;

uint8_t* Pages::allocate(size_t bytes) {
    // Room to begin at a huge page; the rest is never touched.
    const size_t room = bytes + (bytes < kHugeBytes ? 0 : kHugeBytes);
    void* begin = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) return nullptr;
    m_begin = begin;
    m_bytes = room;
    auto* data = static_cast<uint8_t*>(begin);
    if (bytes < kHugeBytes) return data;
    data += (kHugeBytes - reinterpret_cast<uintptr_t>(data) % kHugeBytes) % kHugeBytes;
    madvise(data, bytes, MADV_HUGEPAGE);  // it may refuse: then pages are small
    return data;
}

Pages::~Pages() {
    if (m_begin) munmap(m_begin, m_bytes);
}

#else

uint8_t* Pages::allocate(size_t bytes) {
    m_begin = ::operator new(bytes, std::align_val_t{kPageBytes}, std::nothrow);
    return static_cast<uint8_t*>(m_begin);
}

Pages::~Pages() { ::operator delete(m_begin, std::align_val_t{kPageBytes}); }

#endif

}  // namespace actsparse

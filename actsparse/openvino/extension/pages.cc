#include "pages.hpp"

#if defined(__linux__)
#include <sys/mman.h>

#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <memory>
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

namespace {

// Whether [begin, end) lies in one mapping of a file that nobody here can have written to.
bool is_read_from_file(uintptr_t begin, uintptr_t end) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> maps(std::fopen("/proc/self/maps", "re"), std::fclose);
    if (!maps) return false;
    char line[512];
    bool is_start = true;  // of a line: paths may be longer than what is read at a time
    while (std::fgets(line, sizeof line, maps.get())) {
        uintptr_t first, last;
        char access[5];
        unsigned long inode;
        if (is_start && std::sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %*s %*s %lu", &first, &last, access, &inode) == 4 && first <= begin &&
            end <= last)
            return access[0] == 'r' && access[1] == '-' && inode != 0;
        is_start = std::strchr(line, '\n') != nullptr;
    }
    return false;
}

}  // namespace

void release_file_pages(const uint8_t* data, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = (address + kPageBytes - 1) / kPageBytes * kPageBytes;
    const uintptr_t end = (address + bytes) / kPageBytes * kPageBytes;
    if (begin < end && is_read_from_file(begin, end)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

#else

void release_file_pages(const uint8_t*, size_t) {}

uint8_t* Pages::allocate(size_t bytes) {
    m_begin = ::operator new(bytes, std::align_val_t{kPageBytes}, std::nothrow);
    return static_cast<uint8_t*>(m_begin);
}

Pages::~Pages() { ::operator delete(m_begin, std::align_val_t{kPageBytes}); }

#endif

}  // namespace actsparse

// Memory to read weights from.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actsparse {

// Whole pages, huge ones where the system gives them: fewer translations of addresses, and the streamer goes on for
// longer. What is not written costs no memory.
class Pages {
public:
    Pages() = default;
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages();

    // Memory for so many bytes, aligned to a page; null where there is none. At most once.
    uint8_t* allocate(size_t bytes);

private:
    void* m_begin = nullptr;
    size_t m_bytes = 0;
};

// Give back the memory of what is read from a file and not needed for now: read again, it comes from the file.
// Nothing happens to other memory.
void release_file_pages(const uint8_t* data, size_t bytes);

}  // namespace actsparse

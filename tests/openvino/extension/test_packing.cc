// Packed weights are the saved ones in another order, whoever asks first.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdio>
#include <cstring>
#include <numeric>
#include <thread>

#include "check.hpp"
#include "packed_weights.hpp"

using namespace actsparse;

namespace {

const uint8_t* find_line(const Weights& weights, size_t row, size_t line) {
    const size_t lines = weights.panel_bytes / kLineBytes, panel = line / lines;
    return weights.panel_data(panel) + row * weights.row_bytes(panel) + line % lines * kLineBytes;
}

void test_weights(WeightType type, size_t in, size_t out) {
    std::vector<uint8_t> bytes(in * out * kLineBytes / outputs_per_bytes(type, kLineBytes));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(integer(0, 255));
    const Weights saved{type, in, out, in, bytes.data(), nullptr, false, nullptr};
    const PackedWeights packing;
    Weights packed[3];
    std::vector<std::thread> callers;
    for (Weights& weights : packed) callers.emplace_back([&] { weights = packing.pack(saved, std_threads(2)); });
    for (std::thread& caller : callers) caller.join();
    for (const Weights& weights : packed)
        CHECK(weights.data == packed[0].data, "three callers get different weights of %zu -> %zu", in, out);
    CHECK(reinterpret_cast<uintptr_t>(packed[0].data) % kPageBytes == 0, "%zu -> %zu begins within a page", in, out);
    for (size_t row = 0; row < in; ++row)
        for (size_t line = 0; line < bytes.size() / in / kLineBytes; ++line)
            CHECK(!std::memcmp(find_line(packed[0], row, line), find_line(saved, row, line), kLineBytes),
                  "line %zu of row %zu of %zu -> %zu is another one", line, row, in, out);
}

// Plain weights become what the same weights, saved in rows of input channels, become.
void test_plain_weights(size_t in, size_t outputs, bool is_signed) {
    const size_t out = (outputs + 63) / 64 * 64;
    std::vector<uint8_t> plain(in * outputs);
    for (uint8_t& byte : plain) byte = static_cast<uint8_t>(integer(0, 255));
    const std::vector<uint8_t> original = plain;
    const Weights form{WeightType::u8, in, out, in, nullptr, nullptr, false, nullptr};
    const PackedWeights packing;
    const Weights packed = packing.pack_plain(form, plain.data(), outputs, is_signed, std_threads(2));
    CHECK(plain == original, "plain weights are changed");
    CHECK(packing.pack_plain(form, plain.data(), outputs, is_signed, std_threads(1)).data == packed.data,
          "plain weights are packed twice");
    for (size_t row = 0; row < in; ++row)
        for (size_t i = 0; i < out; ++i) {
            // Output 16 v + 4 l + d of a line is its byte 16 l + 4 v + d.
            const size_t byte = i % 16 / 4 * 16 + i % 64 / 16 * 4 + i % 4;
            const uint8_t expected = i < outputs ? plain[i * in + row] + (is_signed ? 128 : 0) : 0;
            CHECK(find_line(packed, row, i / kLineBytes)[byte] == expected, "output %zu of input %zu of %zu -> %zu is %d, not %d",
                  i, row, in, outputs, find_line(packed, row, i / kLineBytes)[byte], expected);
        }
}

void test_row_weights(size_t in, size_t out) {
    std::vector<uint8_t> bytes(in * out);
    std::iota(bytes.begin(), bytes.end(), uint8_t{1});
    const RowWeights saved{WeightType::u8, in, out, in, bytes.data(), nullptr, false, nullptr};
    const PackedWeights packing;
    const RowWeights packed = packing.pack(saved, std_threads(2));
    CHECK(!std::memcmp(packed.data, saved.data, bytes.size()), "%zu rows of %zu bytes are others", out, in);
    CHECK(packing.pack(saved, std_threads(1)).data == packed.data, "rows are packed twice");
}

#if defined(__linux__)
// How many of the pages of this memory the process holds; -1 where the system does not tell.
int count_pages(const uint8_t* data, size_t bytes) {
    std::FILE* pages = std::fopen("/proc/self/pagemap", "rb");
    if (!pages) return -1;
    std::fseek(pages, static_cast<long>(reinterpret_cast<uintptr_t>(data) / kPageBytes * 8), SEEK_SET);
    int held = 0;
    uint64_t page;
    for (size_t i = 0; i < bytes / kPageBytes; ++i)
        held += std::fread(&page, sizeof page, 1, pages) == 1 && page >> 63;
    std::fclose(pages);
    return held;
}

void test_weights_of_a_file() {
    const size_t in = 64, out = 4096, bytes = in * out;
    std::vector<uint8_t> expected(bytes);
    for (uint8_t& byte : expected) byte = static_cast<uint8_t>(integer(0, 255));
    std::FILE* file = std::tmpfile();
    CHECK(file && std::fwrite(expected.data(), 1, bytes, file) == bytes && std::fflush(file) == 0, "no temporary file");
    for (const int protection : {PROT_READ, PROT_READ | PROT_WRITE}) {
        auto* data = static_cast<uint8_t*>(mmap(nullptr, bytes, protection, MAP_PRIVATE, fileno(file), 0));
        CHECK(data != MAP_FAILED, "the file cannot be mapped");
        const bool is_changed = protection & PROT_WRITE;
        if (is_changed) data[5000] = static_cast<uint8_t>(~expected[5000]);
        const PackedWeights packing;
        packing.pack(Weights{WeightType::u8, in, out, in, data, nullptr, false, nullptr}, std_threads(2));
        const int held = count_pages(data, bytes);
        // What somebody may have written to is not given back.
        CHECK(held == -1 || (is_changed ? held == 64 : held == 0), "%d pages of the file are held", held);
        for (size_t i = 0; i < bytes; ++i)
            CHECK((data[i] == expected[i]) == !(is_changed && i == 5000), "byte %zu of the file is another one", i);
        munmap(data, bytes);
    }
    std::fclose(file);
}
#else
void test_weights_of_a_file() {}
#endif

}  // namespace

void test_packing() {
    test_weights_of_a_file();
    for (const size_t out : {128, 1024, 1152, 4096, 5248, 9216})
        for (const size_t in : {1, 70}) {
            test_weights(WeightType::u8, in, out);
            test_weights(WeightType::u4, in, out);
            test_weights(WeightType::bf16, in, out);
        }
    // More than a huge page.
    test_weights(WeightType::u8, 600, 4224);
    for (const size_t outputs : {1, 64, 100, 4096, 5000})
        for (const size_t in : {1, 64, 70}) {
            test_plain_weights(in, outputs, false);
            test_plain_weights(in, outputs, true);
        }
    test_row_weights(64, 3);
    test_row_weights(128, 20000);
}

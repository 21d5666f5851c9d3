// Packed weights are the saved ones in another order, whoever asks first.
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

void test_row_weights(size_t in, size_t out) {
    std::vector<uint8_t> bytes(in * out);
    std::iota(bytes.begin(), bytes.end(), uint8_t{1});
    const RowWeights saved{WeightType::u8, in, out, in, bytes.data(), nullptr, false, nullptr};
    const PackedWeights packing;
    const RowWeights packed = packing.pack(saved, std_threads(2));
    CHECK(!std::memcmp(packed.data, saved.data, bytes.size()), "%zu rows of %zu bytes are others", out, in);
    CHECK(packing.pack(saved, std_threads(1)).data == packed.data, "rows are packed twice");
}

}  // namespace

void test_packing() {
    for (const size_t out : {128, 1024, 1152, 4096, 5248, 9216})
        for (const size_t in : {1, 70}) {
            test_weights(WeightType::u8, in, out);
            test_weights(WeightType::u4, in, out);
            test_weights(WeightType::bf16, in, out);
        }
    // More than a huge page.
    test_weights(WeightType::u8, 600, 4224);
    test_row_weights(64, 3);
    test_row_weights(128, 20000);
}

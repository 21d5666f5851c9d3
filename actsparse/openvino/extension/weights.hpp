// Where a site's weights lie in memory, and how many bytes of it a kept input channel costs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actsparse {

enum class WeightType { u8, u4, f16, bf16 };

// How wide panels are in saved weights.
constexpr size_t kSavedRowBytes = 1024;
// How wide they are at most once they lie in memory. One row is read in one go: reads of a page keep the second-level
// cache's streamer going, which never crosses a page, and lose least to what it fetches of skipped neighbours.
constexpr size_t kPageBytes = 4096;
// What a kernel reads of a row at a time. Outputs are padded to 64, those of u4 weights to 128.
constexpr size_t kLineBytes = 64;
// Input channels that a kernel takes at a time.
constexpr size_t kPassRows = 8;
// How many passes ahead kernels fetch rows into the second-level cache. (Into the first, too few reads are under way at
// a time: 17 instead of 28 GB/s with two threads.)
constexpr size_t kPrefetchPasses = 2;
// Kept channels of a single token that share one activation scale (OpenVINO's own dynamic quantisation takes 32).
constexpr size_t kSegmentRows = 32;
// Exact mode multiplies by each activation as the sum of so many INT8 terms, each what rounding left of the one before:
// about the 24 bits of a float.
constexpr size_t kExactTerms = 3;
// u8 weights are taken relative to the middle of their range. Sums stay small, and lose fewer bits when the rest of
// their zero point is subtracted.
constexpr int32_t kMiddle = 128;

constexpr size_t outputs_per_bytes(WeightType type, size_t bytes) {
    return type == WeightType::u8 ? bytes : type == WeightType::u4 ? bytes * 2 : bytes / 2;
}

// Weights of one site, input-major within panels of outputs: panel p holds its rows one after another,
// [in][width(p)]. Every panel but the last is panel_bytes wide.
//
// u8: within each 64 bytes, byte 16 l + 4 v + d holds output 16 v + 4 l + d, so that interleaving four rows with
// 128-bit unpacks leaves the products of v's dot product in output order.
// u4: 64 bytes hold 128 outputs; low nibbles are the first 64, high nibbles the others, each ordered as u8.
// f16, bf16: in output order.
struct Weights {
    WeightType type;
    size_t in;
    size_t out;         // padded
    size_t group;       // input channels that share a scale: `in` for u8
    const uint8_t* data;
    const void* scale;  // u8: float [out]; u4: f16 or f32 [in / group][out]; f16, bf16: none
    bool is_scale_f16;
    const void* zero;   // u8: float [out]; u4: uint8 [in / group][out]
    size_t panel_bytes = kSavedRowBytes;

    size_t panel_outputs() const { return outputs_per_bytes(type, panel_bytes); }
    size_t panels() const { return (out + panel_outputs() - 1) / panel_outputs(); }
    size_t width(size_t panel) const {
        const size_t rest = out - panel * panel_outputs();
        return rest < panel_outputs() ? rest : panel_outputs();
    }
    size_t row_bytes(size_t panel) const { return width(panel) * kLineBytes / outputs_per_bytes(type, kLineBytes); }
    size_t bytes() const { return in * out * kLineBytes / outputs_per_bytes(type, kLineBytes); }
    const uint8_t* panel_data(size_t panel) const { return data + panel * in * panel_bytes; }
};

}  // namespace actsparse

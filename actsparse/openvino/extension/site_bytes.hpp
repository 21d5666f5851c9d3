// From what an operation was given, attributes and bytes, to what the kernels take; and what must be refused.
#pragma once

#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "packed_weights.hpp"
#include "rows.hpp"
#include "site.hpp"

namespace actsparse {

// The order of a site's bytes: weights.hpp and rows.hpp describe it.
constexpr int64_t kLayout = 1;
// Bytes without the weights: these are an input of their own, u8 or i8 [out][in], which others may read too.
constexpr int64_t kPlainLayout = 2;

// What a site's bytes do not say of themselves.
struct SiteAttributes {
    std::string weight_type;            // u8, u4, f16 or bf16
    std::string scale_type;             // f32, or f16 (u4); of no meaning without scales
    int64_t in_features = 0;
    int64_t group_size = 0;             // input channels that share a scale (u4)
    std::vector<int64_t> out_features;  // of each layer that reads the site's input
    bool is_decode_only = false;        // mask runs of a single token, let longer ones pass
    bool has_bias = false;              // f32 of each output, padded as scales are, behind all else; files of 0.1.0 have none
    int64_t layout = kLayout;           // what order the bytes are in; files of 0.1.0 do not say: it was the first

    void visit(ov::AttributeVisitor& visitor, const std::string& prefix);
};

// OpenVINO's own threads: evaluate() runs inside its arena. A second pool would fight it for the cores.
Threads openvino_threads();

// The site that `attributes` and `bytes` describe, for an input x of that shape; `packed` keeps its weights.
Site site_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Shape& x, bool is_exact,
             const PackedWeights& packed, const Threads& threads);

// The same with plain weights.
Site plain_site_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Tensor& weights,
                   const ov::Shape& x, bool is_exact, const PackedWeights& packed, const Threads& threads);

// Where the outputs of the site's layers go.
std::vector<Output> site_outputs(const std::vector<int64_t>& out_features, const std::vector<float*>& data);

// Refuse bytes that do not fit the attributes: kernels read them without further checks.
void check_site(const ov::Node* node, const SiteAttributes& attributes, size_t input);

// The same with plain weights, which are the next input.
void check_plain_site(const ov::Node* node, const SiteAttributes& attributes, size_t input);

// The same for a layer that is kept row by row: thresholds f32 [out], weights, scale, zero point (see rows.hpp).
struct Rows {
    RowWeights weights;
    const float* threshold;
};
Rows rows_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Shape& x,
             const PackedWeights& packed, const Threads& threads);
void check_rows(const ov::Node* node, const SiteAttributes& attributes, size_t input);

// Refuse an input x that the site cannot take: for masks of single tokens one in which these cannot be told from others.
void check_input(const ov::Node* node, int64_t in, bool is_decode_only);

// Keep x and the outputs f32 where OpenVINO turns the others into f16, which it does on ARM by default.
void keep_f32(ov::Node* node);

ov::Shape with_last(ov::Shape shape, int64_t last);

}  // namespace actsparse

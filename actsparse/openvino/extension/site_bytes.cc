#include "site_bytes.hpp"

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <map>
#include <numeric>

#if defined(__aarch64__)
namespace ov {
// In OpenVINO's library though not in the headers that come with it. Weak: another release may not have it.
__attribute__((weak)) void disable_conversion(const std::shared_ptr<Node>& node, const element::Type& to);
}  // namespace ov
#endif

namespace actsparse {
namespace {

constexpr int64_t kMaxFeatures = int64_t{1} << 24;

WeightType weight_type_of(const std::string& name) {
    if (name == "u8") return WeightType::u8;
    if (name == "u4") return WeightType::u4;
    if (name == "f16") return WeightType::f16;
    if (name == "bf16") return WeightType::bf16;
    OPENVINO_THROW("actsparse: weight_type must be u8, u4, f16 or bf16, not '", name, "'");
}

size_t sum(const std::vector<int64_t>& values) {
    return static_cast<size_t>(std::accumulate(values.begin(), values.end(), int64_t{0}));
}

size_t padded(size_t out, WeightType type) {
    const size_t multiple = type == WeightType::u4 ? 128 : 64;
    return (out + multiple - 1) / multiple * multiple;
}

size_t padded_in(const SiteAttributes& attributes) {
    return (static_cast<size_t>(attributes.in_features) + kRowLine - 1) / kRowLine * kRowLine;
}

// Where the parts of a site's bytes begin, and where they end.
struct Layout {
    size_t weights, scale, zero, bias, end;
};

// Parts of a layer kept row by row have other sizes than those of a site kept by input channels.
Layout make_layout(const SiteAttributes& attributes, size_t thresholds, size_t in, size_t out) {
    const WeightType type = weight_type_of(attributes.weight_type);
    const auto after = [](size_t begin, size_t bytes) { return begin + (bytes + 63) / 64 * 64; };
    Layout layout{};
    layout.weights = after(0, thresholds * sizeof(float));
    layout.scale = after(layout.weights, attributes.layout == kPlainLayout ? 0 : type == WeightType::u8 ? in * out : type == WeightType::u4 ? in * out / 2 : in * out * 2);
    layout.zero = layout.bias = layout.scale;
    if (type == WeightType::u8) {
        layout.zero = after(layout.scale, out * sizeof(float));
        layout.bias = after(layout.zero, out * sizeof(float));
    } else if (type == WeightType::u4) {
        const size_t scales = in / static_cast<size_t>(attributes.group_size) * out;
        layout.zero = after(layout.scale, scales * (attributes.scale_type == "f16" ? 2 : 4));
        layout.bias = after(layout.zero, scales);
    }
    layout.end = after(layout.bias, attributes.has_bias ? out * sizeof(float) : 0);
    return layout;
}

Layout layout_of(const SiteAttributes& attributes) {
    const auto in = static_cast<size_t>(attributes.in_features);
    return make_layout(attributes, in, in, padded(sum(attributes.out_features), weight_type_of(attributes.weight_type)));
}

Layout row_layout_of(const SiteAttributes& attributes) {
    const size_t out = sum(attributes.out_features);
    return make_layout(attributes, out, padded_in(attributes), out);
}

// Thresholds that let everything pass. An operation has several sites: those of one must not move when another asks.
const float* no_thresholds(size_t channels) {
    static thread_local std::map<size_t, std::vector<float>> none;
    return none.try_emplace(channels, channels, -1.0f).first->second.data();
}

// How many tokens follow each other in x [..., tokens, channels].
size_t run_length(const ov::Shape& shape) { return shape.size() < 2 ? 1 : shape[shape.size() - 2]; }

void check_attributes(const ov::Node* node, const SiteAttributes& attributes, size_t input, int64_t layout = kLayout) {
    const auto check = [&](bool is_fine, const char* what) {
        NODE_VALIDATION_CHECK(node, is_fine, "actsparse: ", what, " (input ", input, ")");
    };
    NODE_VALIDATION_CHECK(node, attributes.layout == layout, "actsparse: the layout of the weights is ", attributes.layout,
                          ", and this extension knows only ", layout, ": the model was made by another version of actsparse");
    check(!attributes.out_features.empty(), "out_features must not be empty");
    for (const int64_t out : attributes.out_features)
        check(out > 0 && out <= kMaxFeatures, "out_features must be positive, and not absurd");
    check(attributes.in_features > 0 && attributes.in_features <= kMaxFeatures,
          "in_features must be positive, and not absurd");
    if (weight_type_of(attributes.weight_type) == WeightType::u4) {
        check(attributes.group_size > 0 && attributes.in_features % attributes.group_size == 0,
              "group_size must divide in_features");
        check(attributes.scale_type == "f16" || attributes.scale_type == "f32", "scale_type must be f16 or f32");
    }
}

void check_bytes(const ov::Node* node, size_t bytes, size_t input) {
    NODE_VALIDATION_CHECK(node, node->get_input_size() > input && node->get_input_element_type(input) == ov::element::u8 &&
                                    node->get_input_partial_shape(input).is_static(),
                          "actsparse: a site's constants must be bytes of known number (input ", input, ")");
    NODE_VALIDATION_CHECK(node, ov::shape_size(node->get_input_shape(input)) == bytes,
                          "actsparse: a site's constants do not have the size of its features (input ", input, ")");
}

// All of a site but the packing of its weights.
Site unpacked_site(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Shape& x, bool is_exact) {
    const WeightType type = weight_type_of(attributes.weight_type);
    const auto in = static_cast<size_t>(attributes.in_features);
    const Layout layout = layout_of(attributes);
    const auto* data = static_cast<const uint8_t*>(bytes.data());
    const bool masks = !attributes.is_decode_only || run_length(x) == 1;
    Site site{{type, in, padded(sum(attributes.out_features), type), in, nullptr, nullptr, false, nullptr},
              masks ? reinterpret_cast<const float*>(data) : no_thresholds(in),
              is_exact};
    // What it makes up for is there where the mask leaves nothing out.
    if (attributes.has_bias && masks) site.bias = reinterpret_cast<const float*>(data + layout.bias);
    site.weights.data = data + layout.weights;
    site.weights.scale = data + layout.scale;
    site.weights.zero = data + layout.zero;
    site.weights.is_scale_f16 = attributes.scale_type == "f16";
    if (type == WeightType::u4) site.weights.group = static_cast<size_t>(attributes.group_size);
    return site;
}

}  // namespace

void SiteAttributes::visit(ov::AttributeVisitor& visitor, const std::string& prefix) {
    visitor.on_attribute(prefix + "weight_type", weight_type);
    visitor.on_attribute(prefix + "scale_type", scale_type);
    visitor.on_attribute(prefix + "in_features", in_features);
    visitor.on_attribute(prefix + "group_size", group_size);
    visitor.on_attribute(prefix + "out_features", out_features);
    visitor.on_attribute(prefix + "is_decode_only", is_decode_only);
    visitor.on_attribute(prefix + "has_bias", has_bias);
    visitor.on_attribute(prefix + "layout", layout);
}

Threads openvino_threads() {
    const auto count = static_cast<size_t>(tbb::this_task_arena::max_concurrency());
    return {count, [count](size_t n, const std::function<void(size_t)>& body) {
                if (n == 1 || count == 1) {
                    for (size_t i = 0; i < n; ++i) body(i);
                    return;
                }
                const auto each = [&body](const tbb::blocked_range<size_t>& range) {
                    for (size_t i = range.begin(); i < range.end(); ++i) body(i);
                };
                if (n == count)
                    tbb::parallel_for(tbb::blocked_range<size_t>(0, n, 1), each, tbb::static_partitioner());
                else
                    tbb::parallel_for(tbb::blocked_range<size_t>(0, n), each);
            }};
}

Site site_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Shape& x, bool is_exact,
             const PackedWeights& packed, const Threads& threads) {
    Site site = unpacked_site(attributes, bytes, x, is_exact);
    site.weights = packed.pack(site.weights, threads);
    return site;
}

Site plain_site_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Tensor& weights,
                   const ov::Shape& x, bool is_exact, const PackedWeights& packed, const Threads& threads) {
    Site site = unpacked_site(attributes, bytes, x, is_exact);
    site.weights = packed.pack_plain(site.weights, static_cast<const uint8_t*>(weights.data()),
                                     sum(attributes.out_features), weights.get_element_type() == ov::element::i8, threads);
    OPENVINO_ASSERT(site.weights.data, "actsparse: there is no memory for ", site.weights.bytes(), " bytes of weights");
    return site;
}

Rows rows_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Shape& x,
             const PackedWeights& packed, const Threads& threads) {
    const WeightType type = weight_type_of(attributes.weight_type);
    const Layout layout = row_layout_of(attributes);
    const auto* data = static_cast<const uint8_t*>(bytes.data());
    const size_t in = padded_in(attributes), out = sum(attributes.out_features);
    const size_t group = type == WeightType::u4 ? static_cast<size_t>(attributes.group_size) : in;
    const bool masks = !attributes.is_decode_only || run_length(x) == 1;
    const RowWeights saved{type, in, out, group, data + layout.weights, data + layout.scale,
                           attributes.scale_type == "f16", data + layout.zero};
    return {packed.pack(saved, threads), masks ? reinterpret_cast<const float*>(data) : no_thresholds(out)};
}

void check_rows(const ov::Node* node, const SiteAttributes& attributes, size_t input) {
    check_attributes(node, attributes, input);
    NODE_VALIDATION_CHECK(node, !attributes.has_bias, "actsparse: rows have no bias (input ", input, ")");
    NODE_VALIDATION_CHECK(node, weight_type_of(attributes.weight_type) != WeightType::u4 ||
                                    attributes.group_size % static_cast<int64_t>(kRowLine) == 0,
                          "actsparse: a row's group_size must be a multiple of ", kRowLine, " (input ", input, ")");
    check_bytes(node, row_layout_of(attributes).end, input);
}

void check_site(const ov::Node* node, const SiteAttributes& attributes, size_t input) {
    check_attributes(node, attributes, input);
    check_bytes(node, layout_of(attributes).end, input);
}

void check_plain_site(const ov::Node* node, const SiteAttributes& attributes, size_t input) {
    check_attributes(node, attributes, input, kPlainLayout);
    check_bytes(node, layout_of(attributes).end, input);
    const ov::Shape shape{sum(attributes.out_features), static_cast<size_t>(attributes.in_features)};
    NODE_VALIDATION_CHECK(node, weight_type_of(attributes.weight_type) == WeightType::u8 && node->get_input_size() > input + 1 &&
                                    (node->get_input_element_type(input + 1) == ov::element::u8 ||
                                     node->get_input_element_type(input + 1) == ov::element::i8) &&
                                    node->get_input_partial_shape(input + 1) == ov::PartialShape(shape),
                          "actsparse: plain weights must be u8 or i8 ", shape, " (input ", input + 1, ")");
}

void check_input(const ov::Node* node, int64_t in, bool is_decode_only) {
    NODE_VALIDATION_CHECK(node, node->get_input_element_type(0) == ov::element::f32, "actsparse: x must be f32");
    const auto& shape = node->get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(node, shape.rank().is_static() && shape.size() >= 1, "actsparse: x must have a known rank");
    NODE_VALIDATION_CHECK(node, shape[shape.size() - 1].compatible(in), "actsparse: x must be [..., ", in, "], not ",
                          shape);
    if (!is_decode_only || shape.size() < 3 || shape.is_static()) return;
    NODE_VALIDATION_CHECK(node, shape[shape.size() - 2].is_dynamic() || shape[shape.size() - 2].get_length() != 1,
                          "actsparse: masks with tokens='decode' cannot tell prompts from single tokens where every "
                          "token is a sequence of its own, as in PagedAttention: set ATTENTION_BACKEND to SDPA, or "
                          "calibrate with tokens='all'");
}

void keep_f32([[maybe_unused]] ov::Node* node) {
#if defined(__aarch64__)
    // Nobody owns a node that is under construction: one that is read from a file is validated again afterwards.
    const auto self = node->weak_from_this().lock();
    if (self && &ov::disable_conversion) ov::disable_conversion(self, ov::element::f16);
#endif
}

ov::Shape with_last(ov::Shape shape, int64_t last) {
    shape.back() = static_cast<size_t>(last);
    return shape;
}

std::vector<Output> site_outputs(const std::vector<int64_t>& out_features, const std::vector<float*>& data) {
    std::vector<Output> outputs;
    size_t begin = 0;
    for (size_t i = 0; i < data.size(); ++i) {
        const size_t end = begin + static_cast<size_t>(out_features[i]);
        outputs.push_back({data[i], begin, end});
        begin = end;
    }
    return outputs;
}

}  // namespace actsparse

#include "operations.hpp"

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <numeric>

namespace actsparse {
namespace {

// OpenVINO's own threads: evaluate() runs inside its arena. A second pool would fight it for the cores.
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

// Where the parts of a site's bytes begin, and where they end.
struct Layout {
    size_t weights, scale, zero, end;
};

Layout layout_of(const SiteAttributes& attributes) {
    const WeightType type = weight_type_of(attributes.weight_type);
    const auto in = static_cast<size_t>(attributes.in_features);
    const size_t out = padded(sum(attributes.out_features), type);
    const auto after = [](size_t begin, size_t bytes) { return begin + (bytes + 63) / 64 * 64; };
    Layout layout{};
    layout.weights = after(0, in * sizeof(float));
    layout.scale = after(layout.weights, type == WeightType::u8 ? in * out : type == WeightType::u4 ? in * out / 2 : in * out * 2);
    layout.zero = layout.end = layout.scale;
    if (type == WeightType::u8) {
        layout.zero = after(layout.scale, out * sizeof(float));
        layout.end = after(layout.zero, out * sizeof(float));
    } else if (type == WeightType::u4) {
        const size_t scales = in / static_cast<size_t>(attributes.group_size) * out;
        layout.zero = after(layout.scale, scales * (attributes.scale_type == "f16" ? 2 : 4));
        layout.end = after(layout.zero, scales);
    }
    return layout;
}

// Thresholds that let everything pass.
const float* no_thresholds(size_t in) {
    static thread_local std::vector<float> none;
    if (none.size() < in) none.resize(in, -1.0f);
    return none.data();
}

// How many tokens follow each other in x [..., tokens, channels].
size_t run_length(const ov::Shape& shape) { return shape.size() < 2 ? 1 : shape[shape.size() - 2]; }

// The site that `attributes` and `bytes` describe, for an input x of that shape.
Site site_of(const SiteAttributes& attributes, const ov::Tensor& bytes, const ov::Shape& x, bool is_exact) {
    const WeightType type = weight_type_of(attributes.weight_type);
    const auto in = static_cast<size_t>(attributes.in_features);
    const Layout layout = layout_of(attributes);
    const auto* data = static_cast<const uint8_t*>(bytes.data());
    Site site{{type, in, padded(sum(attributes.out_features), type), in, nullptr, nullptr, false, nullptr},
              attributes.is_decode_only && run_length(x) != 1 ? no_thresholds(in)
                                                              : reinterpret_cast<const float*>(data),
              is_exact};
    site.weights.data = data + layout.weights;
    site.weights.scale = data + layout.scale;
    site.weights.zero = data + layout.zero;
    site.weights.is_scale_f16 = attributes.scale_type == "f16";
    if (type == WeightType::u4) site.weights.group = static_cast<size_t>(attributes.group_size);
    return site;
}

// Refuse bytes that do not fit the attributes: kernels read them without further checks.
void check_site(const ov::Node* node, const SiteAttributes& attributes, size_t input) {
    const auto check = [&](bool is_fine, const char* what) {
        NODE_VALIDATION_CHECK(node, is_fine, "actsparse: ", what, " (input ", input, ")");
    };
    check(!attributes.out_features.empty(), "out_features must not be empty");
    for (const int64_t out : attributes.out_features)
        check(out > 0 && out <= kMaxFeatures, "out_features must be positive, and not absurd");
    check(attributes.in_features > 0 && attributes.in_features <= kMaxFeatures,
          "in_features must be positive, and not absurd");
    const WeightType type = weight_type_of(attributes.weight_type);
    if (type == WeightType::u4) {
        check(attributes.group_size > 0 && attributes.in_features % attributes.group_size == 0,
              "group_size must divide in_features");
        check(attributes.scale_type == "f16" || attributes.scale_type == "f32", "scale_type must be f16 or f32");
    }
    check(node->get_input_size() > input && node->get_input_element_type(input) == ov::element::u8 &&
              node->get_input_partial_shape(input).is_static(),
          "a site's constants must be bytes of known number");
    check(ov::shape_size(node->get_input_shape(input)) == layout_of(attributes).end,
          "a site's constants do not have the size of its features");
}

// Refuse an input x that the site cannot take.
void check_input(const ov::Node* node, int64_t in) {
    NODE_VALIDATION_CHECK(node, node->get_input_element_type(0) == ov::element::f32, "actsparse: x must be f32");
    const auto& shape = node->get_input_partial_shape(0);
    NODE_VALIDATION_CHECK(node, shape.rank().is_static() && shape.size() >= 1, "actsparse: x must have a known rank");
    NODE_VALIDATION_CHECK(node, shape[shape.size() - 1].compatible(in), "actsparse: x must be [..., ", in, "], not ",
                          shape);
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

}  // namespace

void SiteAttributes::visit(ov::AttributeVisitor& visitor, const std::string& prefix) {
    visitor.on_attribute(prefix + "weight_type", weight_type);
    visitor.on_attribute(prefix + "scale_type", scale_type);
    visitor.on_attribute(prefix + "in_features", in_features);
    visitor.on_attribute(prefix + "group_size", group_size);
    visitor.on_attribute(prefix + "out_features", out_features);
    visitor.on_attribute(prefix + "is_decode_only", is_decode_only);
}

SparseLinear::SparseLinear(const ov::OutputVector& inputs, SiteAttributes site, bool is_exact)
    : Op(inputs), m_site(std::move(site)), m_is_exact(is_exact) {
    constructor_validate_and_infer_types();
}

void SparseLinear::validate_and_infer_types() {
    check_site(this, m_site, 1);
    check_input(this, m_site.in_features);
    auto shape = get_input_partial_shape(0);
    set_output_size(m_site.out_features.size());
    for (size_t i = 0; i < m_site.out_features.size(); ++i) {
        shape[shape.size() - 1] = m_site.out_features[i];
        set_output_type(i, ov::element::f32, shape);
    }
}

std::shared_ptr<ov::Node> SparseLinear::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<SparseLinear>(inputs, m_site, m_is_exact);
}

bool SparseLinear::visit_attributes(ov::AttributeVisitor& visitor) {
    m_site.visit(visitor, "");
    visitor.on_attribute("is_exact", m_is_exact);
    return true;
}

// While parallel loops wait, this thread must not take up another request's work: it would overwrite what this one keeps.
bool SparseLinear::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    return tbb::this_task_arena::isolate([&] { return run(outputs, inputs); });
}

bool SparseLinear::run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const Site site = site_of(m_site, inputs[1], inputs[0].get_shape(), m_is_exact);
    std::vector<float*> data;
    for (size_t i = 0; i < outputs.size(); ++i) {
        outputs[i].set_shape(with_last(inputs[0].get_shape(), m_site.out_features[i]));
        data.push_back(outputs[i].data<float>());
    }
    multiply_site(site, inputs[0].data<const float>(), inputs[0].get_size() / site.weights.in,
                  site_outputs(m_site.out_features, data), selected_kernels(), openvino_threads());
    return true;
}

SparseFeedForward::SparseFeedForward(const ov::OutputVector& inputs, SiteAttributes in, SiteAttributes down,
                                     std::string activation, bool is_exact)
    : Op(inputs), m_in(std::move(in)), m_down(std::move(down)), m_activation(std::move(activation)),
      m_is_exact(is_exact) {
    constructor_validate_and_infer_types();
}

void SparseFeedForward::validate_and_infer_types() {
    activation_of(m_activation);
    check_site(this, m_in, 1);
    check_input(this, m_in.in_features);
    check_site(this, m_down, 2);
    NODE_VALIDATION_CHECK(this, m_in.out_features.size() <= 2 && m_down.out_features.size() == 1,
                          "actsparse: a feed-forward network has at most a gate and an up projection, and one down");
    for (const int64_t out : m_in.out_features)
        NODE_VALIDATION_CHECK(this, out == m_down.in_features, "actsparse: the projections do not have the same hidden features");
    auto shape = get_input_partial_shape(0);
    shape[shape.size() - 1] = m_down.out_features[0];
    set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> SparseFeedForward::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<SparseFeedForward>(inputs, m_in, m_down, m_activation, m_is_exact);
}

bool SparseFeedForward::visit_attributes(ov::AttributeVisitor& visitor) {
    m_in.visit(visitor, "in_");
    m_down.visit(visitor, "down_");
    visitor.on_attribute("activation", m_activation);
    visitor.on_attribute("is_exact", m_is_exact);
    return true;
}

bool SparseFeedForward::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    return tbb::this_task_arena::isolate([&] { return run(outputs, inputs); });
}

bool SparseFeedForward::run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const Site in = site_of(m_in, inputs[1], inputs[0].get_shape(), m_is_exact);
    const Site down = site_of(m_down, inputs[2], inputs[0].get_shape(), m_is_exact);
    const Threads threads = openvino_threads();
    const size_t tokens = inputs[0].get_size() / in.weights.in, hidden = down.weights.in;
    outputs[0].set_shape(with_last(inputs[0].get_shape(), m_down.out_features[0]));
    static thread_local std::vector<float> between;
    between.resize(tokens * hidden * m_in.out_features.size());
    float* gate = between.data();
    float* up = m_in.out_features.size() == 2 ? gate + tokens * hidden : nullptr;
    multiply_site(in, inputs[0].data<const float>(), tokens,
                  site_outputs(m_in.out_features, up ? std::vector<float*>{gate, up} : std::vector<float*>{gate}),
                  selected_kernels(), threads);
    const Activation activation = activation_of(m_activation);
    threads.run(tokens, [&](size_t token) {
        activate(activation, gate + token * hidden, up ? up + token * hidden : nullptr, hidden);
    });
    multiply_site(down, gate, tokens, site_outputs(m_down.out_features, {outputs[0].data<float>()}),
                  selected_kernels(), threads);
    return true;
}

}  // namespace actsparse

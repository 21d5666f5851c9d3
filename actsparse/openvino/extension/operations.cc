#include "operations.hpp"

#include <tbb/task_arena.h>

namespace actsparse {

SparseLinear::SparseLinear(const ov::OutputVector& inputs, SiteAttributes site, bool is_exact)
    : Op(inputs), m_site(std::move(site)), m_is_exact(is_exact) {
    constructor_validate_and_infer_types();
}

void SparseLinear::validate_and_infer_types() {
    keep_f32(this);
    check_site(this, m_site, 1);
    check_input(this, m_site.in_features, m_site.is_decode_only);
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
    const Threads threads = openvino_threads();
    const Site site = site_of(m_site, inputs[1], inputs[0].get_shape(), m_is_exact, m_packed, threads);
    std::vector<float*> data;
    for (size_t i = 0; i < outputs.size(); ++i) {
        outputs[i].set_shape(with_last(inputs[0].get_shape(), m_site.out_features[i]));
        data.push_back(outputs[i].data<float>());
    }
    multiply_site(site, inputs[0].data<const float>(), inputs[0].get_size() / site.weights.in,
                  site_outputs(m_site.out_features, data), selected_kernels(), threads);
    return true;
}

SparseHead::SparseHead(const ov::OutputVector& inputs, SiteAttributes site, bool is_exact)
    : m_site(std::move(site)), m_is_exact(is_exact) {
    set_arguments(inputs);
    constructor_validate_and_infer_types();
}

void SparseHead::validate_and_infer_types() {
    keep_f32(this);
    check_plain_site(this, m_site, 1);
    NODE_VALIDATION_CHECK(this, m_site.out_features.size() == 1, "actsparse: a head is one layer");
    check_input(this, m_site.in_features, m_site.is_decode_only);
    auto shape = get_input_partial_shape(0);
    shape[shape.size() - 1] = m_site.out_features[0];
    set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> SparseHead::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<SparseHead>(inputs, m_site, m_is_exact);
}

bool SparseHead::visit_attributes(ov::AttributeVisitor& visitor) {
    m_site.visit(visitor, "");
    visitor.on_attribute("is_exact", m_is_exact);
    return true;
}

bool SparseHead::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    return tbb::this_task_arena::isolate([&] { return run(outputs, inputs); });
}

bool SparseHead::run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const Threads threads = openvino_threads();
    const ov::Shape shape = inputs[0].get_shape();
    const Site site = plain_site_of(m_site, inputs[1], inputs[2], shape, m_is_exact, m_packed, threads);
    outputs[0].set_shape(with_last(shape, m_site.out_features[0]));
    multiply_site(site, inputs[0].data<const float>(), inputs[0].get_size() / site.weights.in,
                  site_outputs(m_site.out_features, {outputs[0].data<float>()}), selected_kernels(), threads);
    return true;
}

SparseFeedForward::SparseFeedForward(const ov::OutputVector& inputs, SiteAttributes in, SiteAttributes down,
                                     std::string activation, bool is_exact)
    : Op(inputs), m_in(std::move(in)), m_down(std::move(down)), m_activation(std::move(activation)),
      m_is_exact(is_exact) {
    constructor_validate_and_infer_types();
}

void SparseFeedForward::validate_and_infer_types() {
    keep_f32(this);
    activation_of(m_activation);
    check_site(this, m_in, 1);
    check_input(this, m_in.in_features, m_in.is_decode_only || m_down.is_decode_only);
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
    const Threads threads = openvino_threads();
    const Site in = site_of(m_in, inputs[1], inputs[0].get_shape(), m_is_exact, m_packed_in, threads);
    const Site down = site_of(m_down, inputs[2], inputs[0].get_shape(), m_is_exact, m_packed_down, threads);
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

GatedFeedForward::GatedFeedForward(const ov::OutputVector& inputs, SiteAttributes gate, SiteAttributes up,
                                   SiteAttributes down, std::string activation, bool is_exact)
    : Op(inputs), m_gate(std::move(gate)), m_up(std::move(up)), m_down(std::move(down)),
      m_activation(std::move(activation)), m_is_exact(is_exact) {
    constructor_validate_and_infer_types();
}

void GatedFeedForward::validate_and_infer_types() {
    keep_f32(this);
    activation_of(m_activation);
    check_site(this, m_gate, 1);
    check_input(this, m_gate.in_features, m_gate.is_decode_only || m_up.is_decode_only || m_down.is_decode_only);
    check_rows(this, m_up, 2);
    check_site(this, m_down, 3);
    NODE_VALIDATION_CHECK(this, m_gate.out_features.size() == 1 && m_up.out_features.size() == 1 &&
                                    m_down.out_features.size() == 1,
                          "actsparse: a gated feed-forward network has one gate, one up and one down projection");
    NODE_VALIDATION_CHECK(this, m_gate.in_features == m_up.in_features && m_gate.out_features == m_up.out_features &&
                                    m_gate.out_features[0] == m_down.in_features,
                          "actsparse: the projections do not have the same features");
    auto shape = get_input_partial_shape(0);
    shape[shape.size() - 1] = m_down.out_features[0];
    set_output_type(0, ov::element::f32, shape);
}

std::shared_ptr<ov::Node> GatedFeedForward::clone_with_new_inputs(const ov::OutputVector& inputs) const {
    return std::make_shared<GatedFeedForward>(inputs, m_gate, m_up, m_down, m_activation, m_is_exact);
}

bool GatedFeedForward::visit_attributes(ov::AttributeVisitor& visitor) {
    m_gate.visit(visitor, "gate_");
    m_up.visit(visitor, "up_");
    m_down.visit(visitor, "down_");
    visitor.on_attribute("activation", m_activation);
    visitor.on_attribute("is_exact", m_is_exact);
    return true;
}

bool GatedFeedForward::evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    return tbb::this_task_arena::isolate([&] { return run(outputs, inputs); });
}

bool GatedFeedForward::run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
    const ov::Shape shape = inputs[0].get_shape();
    const Threads threads = openvino_threads();
    const Site gate = site_of(m_gate, inputs[1], shape, m_is_exact, m_packed_gate, threads);
    const Rows up = rows_of(m_up, inputs[2], shape, m_packed_up, threads);
    const Site down = site_of(m_down, inputs[3], shape, m_is_exact, m_packed_down, threads);
    const auto* x = inputs[0].data<const float>();
    const size_t in = gate.weights.in, hidden = down.weights.in, tokens = inputs[0].get_size() / in;
    outputs[0].set_shape(with_last(shape, m_down.out_features[0]));
    static thread_local std::vector<float> between;
    between.resize(tokens * hidden);
    float* h = between.data();
    multiply_site(gate, x, tokens, site_outputs(m_gate.out_features, {h}), selected_kernels(), threads);
    const Activation activation = activation_of(m_activation);
    threads.run(tokens, [&](size_t token) { activate(activation, h + token * hidden, nullptr, hidden); });
    multiply_rows(up.weights, up.threshold, m_is_exact, x, in, tokens, h, selected_kernels(), threads);
    multiply_site(down, h, tokens, site_outputs(m_down.out_features, {outputs[0].data<float>()}), selected_kernels(),
                  threads);
    return true;
}

}  // namespace actsparse

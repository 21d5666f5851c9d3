// The OpenVINO operations. All constants of a site lie in one input of bytes, because OpenVINO copies an operation and
// every one of its inputs whenever it infers shapes, once for each token: threshold f32 [in], weights, and for u8 and u4
// weights scale and zero point, as weights.hpp describes them, each part padded to 64 bytes. When an operation first runs
// it copies its weights to memory that this machine reads faster; a copy of the operation starts without.
#pragma once

#include <openvino/op/matmul.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <vector>

#include "elementwise.hpp"
#include "site_bytes.hpp"

namespace actsparse {

// The Linear layers of one site: output i = mask(x) @ weights of layer i.
class SparseLinear : public ov::op::Op {
public:
    OPENVINO_OP("SparseLinear", "actsparse");
    SparseLinear() = default;
    SparseLinear(const ov::OutputVector& inputs, SiteAttributes site, bool is_exact);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    bool run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    SiteAttributes m_site;
    PackedWeights m_packed;
    bool m_is_exact = false;
};

// The output head: one SparseLinear whose weights, the embedding's in many models, are saved once, in OpenVINO's own order
// (layout 2). It is a MatMul to those who ask: openvino-genai looks for one before the logits, to compute only those of
// the tokens that it samples. Its three inputs keep OpenVINO's own transformations of multiplications away from it.
class SparseHead : public ov::op::v0::MatMul {
public:
    OPENVINO_OP("SparseHead", "actsparse", ov::op::v0::MatMul);
    SparseHead() = default;
    SparseHead(const ov::OutputVector& inputs, SiteAttributes site, bool is_exact);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    bool run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    SiteAttributes m_site;
    PackedWeights m_packed;
    bool m_is_exact = false;
};

// A whole feed-forward network: down(mask(f(gate(mask(x))) * up(mask(x)))), or without the gate, down(mask(f(up))).
class SparseFeedForward : public ov::op::Op {
public:
    OPENVINO_OP("SparseFeedForward", "actsparse");
    SparseFeedForward() = default;
    SparseFeedForward(const ov::OutputVector& inputs, SiteAttributes in, SiteAttributes down, std::string activation,
                      bool is_exact);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    bool run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    SiteAttributes m_in, m_down;
    PackedWeights m_packed_in, m_packed_down;
    std::string m_activation = "silu";
    bool m_is_exact = false;
};

// A feed-forward network whose gate tells which rows of the up projection matter:
// down(mask(mask(f(gate(mask(x)))) * up(x))).
class GatedFeedForward : public ov::op::Op {
public:
    OPENVINO_OP("GatedFeedForward", "actsparse");
    GatedFeedForward() = default;
    GatedFeedForward(const ov::OutputVector& inputs, SiteAttributes gate, SiteAttributes up, SiteAttributes down,
                     std::string activation, bool is_exact);

    void validate_and_infer_types() override;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override;

private:
    bool run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const;

    SiteAttributes m_gate, m_up, m_down;
    PackedWeights m_packed_gate, m_packed_up, m_packed_down;
    std::string m_activation = "silu";
    bool m_is_exact = false;
};

}  // namespace actsparse

"""Layers inside of others: adapters, layers whose weights are read past them, layers that multiply in their own way."""

from typing import Any

import pytest
import torch
from torch import nn

from actsparse import (
    ActsparseError,
    ScopeError,
    TargetScope,
    load_thresholds,
    remove_sparsifiers,
    save_thresholds,
    sparsify_activations,
)
from actsparse.openvino import export_model
from actsparse.thresholds import read_thresholds
from actsparse.torch.insertion import named_masks

ALGORITHMS = ["magnitude", "magnitude+uniform+rows", "auto", "wina+bias"]


def add_adapters(model: Any, *, are_trained: bool = False, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=not are_trained, **settings)
    return peft.get_peft_model(model, config).eval()


# ---- Adapters


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapters_that_add_nothing_change_nothing(make_model, batches, algorithm) -> None:
    plain = sparsify_activations(make_model(), batches, 0.5, algorithm=algorithm)
    adapted = add_adapters(make_model())
    assert sparsify_activations(adapted, batches, 0.5, algorithm=algorithm) is adapted
    assert named_masks(adapted.get_base_model()) == named_masks(plain)
    assert adapted(**batches[0]).logits.equal(plain(**batches[0]).logits)


def test_adapters_are_never_masked_and_roles_see_through_them(make_model, batches) -> None:
    adapted = add_adapters(make_model(), are_trained=True)
    scopes: Any = {TargetScope(roles=(role,)): 0.5 for role in ("ffn.gate", "ffn.up", "ffn.down", "attention.qkv")}
    sparsify_activations(adapted, batches, {**scopes, TargetScope(patterns=[".*o_proj"]): 0.3})
    names = [name for name, module in adapted.named_modules() if "activation_sparsifier" in module._modules]
    assert len(names) == 14
    assert all(name.endswith(".base_layer") for name in names)
    assert not any("base_layer" in name for name in named_masks(adapted.get_base_model()))


def test_merging_keeps_the_masks_under_their_names(make_model, batches, tmp_path) -> None:
    adapted = add_adapters(make_model(), are_trained=True)
    sparsify_activations(adapted, batches, 0.5, algorithm="magnitude+uniform+rows")
    masks = named_masks(adapted.get_base_model())
    save_thresholds(adapted, tmp_path / "t.safetensors")
    merged = adapted.merge_and_unload()
    assert named_masks(merged) == masks
    # A file of the one fits the other, and the model before it had adapters.
    for model in (add_adapters(make_model()), merged, make_model()):
        load_thresholds(model, tmp_path / "t.safetensors")
    save_thresholds(merged, tmp_path / "merged.safetensors")
    first, second = (read_thresholds(tmp_path / f"{name}.safetensors").masks for name in ("t", "merged"))
    assert first == second == masks
    remove_sparsifiers(merged)
    assert not named_masks(merged)
    expected = add_adapters(make_model(), are_trained=True).merge_and_unload()
    torch.testing.assert_close(merged(**batches[0]).logits, expected(**batches[0]).logits)


def test_the_head_keeps_its_role_behind_an_adapter(make_model, batches) -> None:
    adapted = add_adapters(make_model(), modules_to_save=None, exclude_modules=["q_proj"])
    sparsify_activations(adapted, batches, {TargetScope(roles=("head",)): 0.5})
    assert list(named_masks(adapted.get_base_model())) == ["lm_head"]


def test_a_model_with_adapters_is_not_exported_before_they_are_merged(make_model, batches, tmp_path) -> None:
    adapted = sparsify_activations(add_adapters(make_model()), batches, 0.5)
    with pytest.raises(ActsparseError, match=r"adapters.*merge_and_unload"):
        export_model(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- Layers that are not called


class Encoder(nn.Module):
    """Two of torch's own transformer layers, whose attention reads its last projection past it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def test_a_layer_that_is_not_called_is_left_out_and_refused_by_name() -> None:
    data = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    model = sparsify_activations(Encoder().eval(), data, 0.5)
    masked = named_masks(model)
    assert {name.rpartition(".")[2] for name in masked} == {"linear1", "linear2"}
    assert len(masked) == 4
    with pytest.raises(ScopeError, match=r"out_proj cannot be masked: the model reads its weights without calling it"):
        sparsify_activations(model, data, {TargetScope(patterns=[".*out_proj.*"]): 0.5})
    assert named_masks(model) == masked
    everything, out = TargetScope(types=["linear"]), TargetScope(patterns=[r".*out_proj\b.*"])
    sparsify_activations(model, data, {everything: 0.5}, ignored_scope=out)
    assert named_masks(model).keys() == masked.keys()


# ---- Layers that multiply in their own way


class Linear4bit(nn.Linear):
    """A layer whose weight is packed, as bitsandbytes has them."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.weight = nn.Parameter(torch.zeros(size * size // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + self.bias


class Packed(nn.Module):
    def __init__(self, *, has_head: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear4bit(8), Linear4bit(8)])
        self.head = nn.Linear(8, 4) if has_head else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("has_head", [True, False])
def test_packed_layers_are_named_where_there_is_nothing_to_mask(has_head: bool) -> None:
    data = [torch.randn(2, 8)]
    with pytest.raises(ScopeError, match=r"2 Linear4bit\) multiplies by code of its own, as quantized weights do"):
        sparsify_activations(Packed(has_head=has_head), data, 0.5)
    if has_head:
        model = sparsify_activations(Packed(has_head=True), data, {TargetScope(names=["head"]): 0.5})
        assert list(named_masks(model)) == ["head"]

"""Masks of exact zeros: found in any network that has them, without data, and the outputs stay what they are."""

from collections.abc import Callable
from typing import Any

import nncf
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, LlamaConfig, NemotronConfig, T5Config
from transformers import T5ForConditionalGeneration as T5

from actsparse import (
    TargetScope,
    load_thresholds,
    measure_sparsity,
    remove_sparsifiers,
    save_thresholds,
    sparsify_activations,
)
from actsparse.algorithms import get_algorithm
from actsparse.errors import ActsparseError, DatasetError, ScopeError
from actsparse.torch.insertion import named_masks

from .conftest import GROUPED, VOCABULARY


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


class Gated(nn.Module):
    """A network whose activation is a function and no module."""

    def __init__(self, activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self._activate = activate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self._activate(self.gate(x), self.up(x)))


def make_gated(activate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Gated(activate), Gated(activate)).eval()


GEMMA_3N: dict[str, Any] = {
    "head_dim": 8,
    "intermediate_size": [48, 48],
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "altup_num_inputs": 2,
}
# How many layers of inputs and of rows they have, with one way or several to make zeros.
MODELS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "gated relu": (lambda: make(LlamaConfig(**GROUPED, hidden_act="relu")), 2, 2),
    "gated relu squared": (lambda: make(LlamaConfig(**GROUPED, hidden_act="relu2")), 2, 2),
    "relu squared": (lambda: make(NemotronConfig(**GROUPED)), 2, 0),
    # The second of its networks has no cutoff.
    "top-k": (lambda: make(Gemma3nTextConfig(**GROUPED | GEMMA_3N, activation_sparsity_pattern=[0.9, 0.0])), 1, 1),
}
FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "dReLU": lambda gate, up: F.relu(gate) * F.relu(up),
    "FATReLU": lambda gate, up: torch.where(gate >= 0.1, gate, 0) * up,
    "by comparison": lambda gate, up: gate * (gate > 0.1) * up,
}


def count_zeros(model: Any, batch: Any, name: str) -> float:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].eq(0)))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return float(torch.stack(seen).float().mean())


@pytest.mark.parametrize("name", ["opt", *MODELS])
@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_outputs_stay_bit_for_bit_and_all_zeros_count(
    name: str, tokens: str, make_model: Any, batches: list[Any]
) -> None:
    maker, inputs, rows = MODELS.get(name, (lambda: make_model("opt"), 2, 0))
    model = maker()
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    assert sparsify_activations(model, algorithm="zeros", tokens=tokens) is model
    masks = named_masks(model)
    assert sorted(mask.is_of_rows for mask in masks.values()) == [False] * inputs + [True] * rows
    assert all(mask.threshold == 0 and mask.tokens == tokens for mask in masks.values())
    with torch.no_grad():
        assert all(torch.equal(model(**x).logits, y) for x, y in zip(batches, expected, strict=True))
    if tokens == "all":
        measured = {layer.name: layer.sparsity for layer in measure_sparsity(model, batches[:1]).layers}
        down = next(name for name, mask in masks.items() if not mask.is_of_rows)
        assert measured[down] == pytest.approx(count_zeros(remove_sparsifiers(model), batches[0], down))
        assert measured[down] > 0.3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_no_modules_have_masks_of_inputs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x = make_gated(FUNCTIONS[name]), torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
        sparsify_activations(model, [x], algorithm="zeros")
        assert torch.equal(model(x), expected)
    assert list(named_masks(model)) == ["0.down", "1.down"]
    # Both factors of dReLU are zero in places: what multiplies up is not what the gate gives.
    assert ("rows of up projections are not masked" in caplog.text) == (name != "dReLU")


def test_an_encoder_and_a_decoder_need_no_data_either() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": VOCABULARY}
    model = T5(T5Config(**sizes, decoder_start_token_id=0)).eval()
    assert len(named_masks(sparsify_activations(model, algorithm="zeros"))) == 2


def test_scopes_restrict_it_and_others_add_to_it(batches: list[Any]) -> None:
    model = make(LlamaConfig(**GROUPED, hidden_act="relu"))
    second = TargetScope(patterns=[r".*layers\.1\..*"])
    sparsify_activations(model, None, {second: 1.0}, algorithm="zeros")
    assert {name.split(".")[2] for name in named_masks(model)} == {"1"}
    sparsify_activations(model, None, 1.0, second, algorithm="zeros")
    zeros = named_masks(model)
    assert {name.split(".")[2] for name in zeros} == {"0"}
    attention = TargetScope(roles=("attention.qkv", "attention.out"))
    sparsify_activations(model, batches, {attention: 0.4}, algorithm="auto", keep_existing=True)
    both = named_masks(model)
    assert len(both) == len(zeros) + 8
    assert {name: both[name] for name in zeros} == zeros
    # And the other way round.
    sparsify_activations(model, algorithm="zeros", keep_existing=True, target_sparsity_by_scope={second: 1.0})
    assert named_masks(model).keys() >= zeros.keys()


def test_they_are_saved_loaded_and_live_with_compressed_weights(batches: list[Any], tmp_path: Any) -> None:
    model = make(LlamaConfig(**GROUPED, hidden_act="relu"))
    save_thresholds(sparsify_activations(model, algorithm="zeros"), tmp_path / "file")
    masks = named_masks(remove_sparsifiers(model))
    assert not masks
    model = nncf.compress_weights(model, dataset=nncf.Dataset(batches[:1]))
    with torch.no_grad():
        expected = model(**batches[0]).logits
        assert torch.equal(load_thresholds(model, tmp_path / "file")(**batches[0]).logits, expected)
        loaded = named_masks(model)
        assert named_masks(sparsify_activations(model, algorithm="zeros")) == loaded
        assert torch.equal(model(**batches[0]).logits, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"algorithm": "zeros"}, ScopeError, r"no activations are zero by themselves.* silu$"),
        ({"algorithm": "zeros", "target_sparsity_by_scope": 0.5}, ScopeError, r"targets are 1\.0"),
        ({"algorithm": "magnitude"}, DatasetError, "magnitude needs a calibration dataset"),
        ({"dataset": [{}], "algorithm": "wina"}, ScopeError, "target_sparsity_by_scope is missing"),
        ({"algorithm": "zeros+shift"}, ActsparseError, r"leave \+shift out"),
        ({"algorithm": "wina+zeros"}, ActsparseError, "unknown score"),
        ({"algorithm": "weight-norm+zeros"}, ActsparseError, "magnitudes alone"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    arguments: dict[str, Any], error: type[Exception], message: str, llama: Any, snapshot: Any
) -> None:
    before = snapshot(llama)
    with pytest.raises(error, match=message) as caught:
        sparsify_activations(llama, **arguments)
    assert "\n" not in str(caught.value)
    assert snapshot(llama) == before


def test_a_scope_without_zeros_and_a_model_without_known_inputs_are_named() -> None:
    model = make(LlamaConfig(**GROUPED, hidden_act="relu"))
    scopes = {TargetScope(roles=("ffn.down",)): 1.0, TargetScope(roles=("attention.out",)): 1.0}
    with pytest.raises(ScopeError, match=r"attention\.out.* has no layer whose input"):
        sparsify_activations(model, None, scopes, algorithm="zeros")
    assert not named_masks(model)
    with pytest.raises(DatasetError, match="Sequential takes is not known: give a dataset"):
        sparsify_activations(make_gated(FUNCTIONS["dReLU"]), algorithm="zeros")


def test_it_is_an_algorithm_like_others() -> None:
    zeros = get_algorithm("zeros")
    assert (zeros.allocation, zeros.rows, zeros.needs_data) == ("zeros", True, False)
    assert not get_algorithm("magnitude+zeros").rows

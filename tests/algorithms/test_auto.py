"""The recommended algorithm is not worse than magnitude, on models that gradients are misled by as on others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actsparse import load_thresholds, remove_sparsifiers, save_thresholds, sparsify_activations
from actsparse.algorithms import CANDIDATES, MeasurementCache, get_algorithm
from actsparse.calibration import Settings
from actsparse.evaluation.bootstrap import bootstrap_interval
from actsparse.sparsify import calibrate
from actsparse.thresholds import read_thresholds
from actsparse.torch.insertion import named_sparsifiers

pytestmark = pytest.mark.slow

WORDS, LENGTH, BOS = 24, 48, 0
STEPS, BATCH = 150, 16


def make_windows(count: int, seed: int) -> torch.Tensor:
    """Draw texts of a language whose next word depends on the last two, each beginning with BOS."""
    rules = torch.randint(1, WORDS, (3, WORDS, 3), generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    words = torch.zeros(count, LENGTH, dtype=torch.long)
    words[:, 1] = torch.randint(1, WORDS, (count,), generator=generator)
    for i in range(2, LENGTH):
        likely = (torch.rand(count, 1, generator=generator) < torch.tensor([0.6, 0.85])).sum(1)
        words[:, i] = rules[words[:, i - 2] % 3, words[:, i - 1], 2 - likely]
    return words


def plant_outliers(model: Any) -> None:
    """Make some channels of what blocks read thirty times as large, and their weights as much smaller."""
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight[:3] *= 30
            for reader in readers:
                reader.weight[:, :3] /= 30


def plant_sink(model: Any) -> None:
    """Give the first token an activation that is far from any other's, as attention sinks have."""
    model.model.embed_tokens.weight[BOS, 5] = 60.0


def train(model: Any) -> Any:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    data = make_windows(STEPS * BATCH, seed=1).split(BATCH)
    for batch in data:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, num_key_value_heads=2, max_position_embeddings=64))


def make_plain() -> Any:
    return train(make_llama())


def make_with_sink_and_outliers() -> Any:
    model = make_llama()
    with torch.no_grad():
        plant_sink(model)
    train(model)
    with torch.no_grad():
        plant_outliers(model)
    return model


def make_without_gates() -> Any:
    torch.manual_seed(0)
    return train(GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=64, n_layer=3, n_head=4, n_positions=64)))


MODELS: dict[str, Callable[[], Any]] = {
    "plain": make_plain,
    "sink and outliers": make_with_sink_and_outliers,
    "without gates": make_without_gates,
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest, models: dict[str, Any]) -> Any:
    """A small model that has learned a language, trained once."""
    name: str = request.param
    if name not in models:
        models[name] = MODELS[name]()
    yield models[name]
    remove_sparsifiers(models[name])


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": window} for window in make_windows(32, seed=2).split(4)]


@torch.no_grad()
def window_losses(model: Any) -> np.ndarray:
    windows = make_windows(96, seed=3)
    logits = model(input_ids=windows).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1).numpy()


def test_the_models_have_learned_something(model: Any) -> None:
    assert window_losses(model).mean() < 0.6 * np.log(WORDS)


@pytest.mark.parametrize("target", [0.3, 0.5])
def test_auto_is_not_worse_than_magnitude_on_text_it_has_not_seen(model: Any, batches: Any, target: float) -> None:
    found = {}
    for algorithm in ("magnitude", "auto"):
        sparsify_activations(model, batches, target, algorithm=algorithm)
        found[algorithm] = window_losses(model)
    difference = found["auto"] - found["magnitude"]
    low, _ = bootstrap_interval(difference, np.ones_like(difference))
    assert low <= 0


def calibrate_half(model: Any, batches: Any, algorithm: str) -> Any:
    return calibrate(model, batches, 0.5, None, Settings(get_algorithm(algorithm), cache=MeasurementCache()))


def test_what_was_tried_is_told_and_took_at_most_ten_runs_of_the_data(model: Any, batches: Any, tmp_path: Path) -> None:
    took = calibrate_half(model, batches, "auto")
    # A backward pass takes about as long as two forwards.
    assert took.forwards + 2 * took.backwards <= 10
    selection = took.selection
    assert selection is not None
    has_gates = hasattr(model, "model")
    # Without gates there are no rows, and what differs by them alone is one candidate.
    plain = ["magnitude", "magnitude+attribution", "magnitude+perturbation"]
    assert list(selection.divergences) == (list(CANDIDATES) if has_gates else plain)
    assert selection.losses.keys() == selection.divergences.keys()
    nearer = [name for name, found in selection.divergences.items() if found < selection.divergences[selection.chosen]]
    assert all(selection.losses[name] > min(selection.losses.values()) for name in nearer)
    assert any(mask.rows_of for _, mask in named_sparsifiers(model)) == ("rows" in selection.chosen)
    path = tmp_path / "thresholds.safetensors"
    save_thresholds(model, path)
    assert read_thresholds(path).notes["selection"] == selection.to_dict()
    # A file of a model that was given a file's thresholds says the same.
    load_thresholds(remove_sparsifiers(model), path)
    save_thresholds(model, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_masks_are_those_of_the_algorithm_that_was_chosen(model: Any, batches: Any) -> None:
    selection = calibrate_half(model, batches, "auto").selection
    expected = {name: mask.threshold for name, mask in named_sparsifiers(model)}
    calibrate_half(model, batches, selection.chosen)
    assert {name: mask.threshold for name, mask in named_sparsifiers(model)}.keys() == expected.keys()
    assert all(torch.equal(mask.threshold, expected[name]) for name, mask in named_sparsifiers(model))


@pytest.mark.parametrize(("algorithm", "forwards"), [("magnitude", 1), ("wina", 1), ("nncf", 1)])
def test_runs_of_the_data_are_counted(model: Any, batches: Any, algorithm: str, forwards: int) -> None:
    took = calibrate_half(model, batches, algorithm)
    # Weights are read in one run of one batch.
    assert took.forwards == pytest.approx(forwards, abs=1.5 / len(batches))
    assert took.backwards == 0
    assert took.selection is None
    assert all(mask.selection is None for _, mask in named_sparsifiers(model))


def test_one_batch_is_enough(model: Any, batches: Any) -> None:
    took = calibrate_half(model, batches[:1], "auto")
    assert took.selection is not None
    assert took.selection.held_out == 1

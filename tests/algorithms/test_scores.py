"""Scores: what each importance is, computed by hand from gradients."""

from typing import Any

import pytest
import torch

from actsparse import ActsparseError, measure_sparsity, sparsify_activations
from actsparse.algorithms import SCORES, GradientSums
from actsparse.algorithms.scores import geometric_mean
from actsparse.torch.insertion import named_sparsifiers

GRADIENT_SCORES = ("fisher", "layer-fisher", "gradient", "gxo", "snip", "corrected-gxo", "fisher-blend")


class FewNumbers:
    """Measurements of one site with three channels, given by hand."""

    def __init__(self, x: torch.Tensor, g: torch.Tensor) -> None:
        self._sums = GradientSums(x.shape[-1])
        self._sums.add(x, g)

    def weight_norms(self, _site: str) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, 3.0])

    def gradients(self) -> dict[str, GradientSums]:
        return {"site": self._sums}

    def sensitivities(self) -> dict[str, float]:
        return {"site": 0.25}

    def up_rms(self, _site: str) -> torch.Tensor:
        return torch.ones(())


@pytest.fixture
def numbers() -> Any:
    return FewNumbers(
        torch.tensor([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]]), torch.tensor([[0.3, 0.4, 1.0], [-0.3, 0.4, 0]])
    )


def importance(numbers: Any, score: str) -> list[float]:
    return SCORES[score](numbers, "site").reshape(-1).tolist()


def test_every_importance_by_hand(numbers: Any) -> None:
    assert importance(numbers, "magnitude") == [1.0]
    assert importance(numbers, "weight-norm") == [1.0, 2.0, 3.0]
    assert importance(numbers, "measured") == [0.25]
    fisher = [0.3, 0.4, 0.5**0.5]
    assert importance(numbers, "fisher") == pytest.approx(fisher)
    assert importance(numbers, "layer-fisher") == pytest.approx([sum(fisher) / 3])
    assert importance(numbers, "gradient") == pytest.approx([0.3, 0.4, 0.5])
    assert importance(numbers, "snip") == pytest.approx([(0.3 + 0.9) / 4, 1.6 / 4, 0.0], abs=2e-3)
    # -g x: -0.3 + 0.9 and 0.8 - 0.8.
    assert importance(numbers, "gxo") == pytest.approx([0.6 / 4, 0.0, 0.0], abs=2e-3)
    norms = [(0.09 + 0.16 + 1) ** 0.5, 0.5]
    corrected = [(0.6 + norms[0] / 2 + 3 * norms[1] / 2) / 4, (norms[0] + norms[1]) / 4, 0.0]
    assert importance(numbers, "corrected-gxo") == pytest.approx(corrected, abs=2e-3)


def test_a_blend_lies_between_its_parts(numbers: Any) -> None:
    fisher, layer = SCORES["fisher"], SCORES["layer-fisher"]
    half = geometric_mean((fisher, 0.5), (layer, 0.5))(numbers, "site")
    assert torch.allclose(half, (fisher(numbers, "site") * layer(numbers, "site")).sqrt())
    assert torch.allclose(geometric_mean((fisher, 1.0), (layer, 0.0))(numbers, "site"), fisher(numbers, "site"))


def test_no_channel_is_worth_nothing(numbers: Any) -> None:
    assert all((SCORES[score](numbers, "site") > 0).all() for score in SCORES)


def test_sums_do_not_depend_on_batching() -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 6, 10, 8, generator=generator).unbind()
    whole, parts = GradientSums(8), GradientSums(8)
    whole.add(x, g)
    for i in (4, 1, 0, 5, 3, 2):
        parts.add(x[i], g[i])
    assert whole.tokens == parts.tokens == 60
    for name in ("square", "absolute", "magnitude", "attribution", "saliency", "correction"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), rtol=1e-5), name


@pytest.mark.parametrize("score", [score for score in SCORES if score != "magnitude"])
@pytest.mark.parametrize("architecture_", ["llama", "gpt2", "phi3"])
def test_every_score_meets_the_target_on_the_calibration_data(
    score: str, architecture_: str, make_model: Any, make_batches: Any
) -> None:
    batches = make_batches(1, batch_size=1, length=48)
    model = make_model(architecture_)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify_activations(model, batches, 0.4, algorithm=f"{score}+uniform")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for layer in measure_sparsity(model, batches).layers:
        assert layer.sparsity == pytest.approx(0.4, abs=0.003), layer.name
    shapes = {tuple(sparsifier.threshold.shape) for _, sparsifier in named_sparsifiers(model)}
    is_by_channel = score not in ("gate", "layer-fisher", "measured")
    assert (() not in shapes) == is_by_channel


@pytest.mark.parametrize("score", GRADIENT_SCORES)
def test_without_a_next_token_loss_a_gradient_score_says_what_to_do(
    score: str, make_model: Any, batches: list[Any]
) -> None:
    model = make_model("bert")
    with pytest.raises(ActsparseError, match=r"no next-token loss.*labels.*loss=.*needs no gradient"):
        sparsify_activations(model, batches, 0.4, algorithm=f"{score}+uniform")
    assert not list(named_sparsifiers(model))


def test_labels_or_a_loss_of_ones_own_give_an_encoder_gradients(make_model: Any, batches: list[Any]) -> None:
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in batches]
    by_labels, by_loss = make_model("bert"), make_model("bert")

    def loss(output: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="sum"
        )

    sparsify_activations(by_labels, labelled, 0.4, algorithm="fisher+uniform")
    sparsify_activations(by_loss, batches, 0.4, algorithm="fisher+uniform", loss=loss)
    for (name, left), (_, right) in zip(named_sparsifiers(by_labels), named_sparsifiers(by_loss), strict=True):
        assert torch.allclose(left.threshold, right.threshold, rtol=1e-4), name

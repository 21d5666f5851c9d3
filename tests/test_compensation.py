"""What layers get in the place of what is left out: SCAP's shift and R-Sparse's low-rank part."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from actsparse import (
    ActsparseError,
    TargetScope,
    load_thresholds,
    measure_sparsity,
    save_thresholds,
    sparsify_activations,
)
from actsparse.algorithms import get_algorithm
from actsparse.errors import ThresholdsError
from actsparse.mask import NO_COMPENSATION, Compensation
from actsparse.sparsify import remove_sparsifiers
from actsparse.torch.insertion import named_sparsifiers
from actsparse.torch.layers import in_features
from actsparse.torch.sparsifier import ActivationSparsifier

WIDTH = 64
ONE = TargetScope(patterns=["1"])


def make_network(weight: torch.Tensor, activation: nn.Module) -> nn.Module:
    network = nn.Sequential(activation, nn.Linear(weight.shape[1], weight.shape[0]))
    network[1].weight.data.copy_(weight)
    return network


class Crowd(nn.Module):
    """Entries crowd around 2, with a tail to one side of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 + x.clamp(min=0) ** 3 + 0.05 * x


def make_batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 64, WIDTH, generator=generator) for _ in range(8)]


def error(network: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        dense = remove_sparsifiers(copy.deepcopy(network))(x)
        return float((network(x) - dense).norm() / dense.norm())


def low_rank_weight() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    leading = torch.randn(WIDTH, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    return leading + 0.1 * torch.randn(WIDTH, WIDTH, generator=generator)


def test_a_shift_takes_the_place_of_what_is_close_to_it() -> None:
    mask = ActivationSparsifier(0.5)
    mask.threshold.fill_(0.5)
    mask.set_compensation(Compensation(shift=torch.tensor(1.0)))
    assert torch.equal(mask(torch.tensor([[0.75, 1.5, 2.0, 0.0, -1.0]])), torch.tensor([[1.0, 1.0, 2.0, 0.0, -1.0]]))


def test_a_basis_lets_pass_what_lies_along_it() -> None:
    mask = ActivationSparsifier(0.5)
    mask.threshold.fill_(1.0)
    basis = torch.tensor([[0.6], [0.8], [0.0]])
    mask.set_compensation(Compensation(basis=basis))
    # (0.5, 0.5, 0) is left out of (0.5, 0.5, 3); along the basis it measures 0.7.
    torch.testing.assert_close(mask(torch.tensor([[0.5, 0.5, 3.0]])), torch.tensor([[0.42, 0.56, 3.0]]))


def test_right_singular_vectors_make_the_truncated_decomposition() -> None:
    # R-Sparse's own form: W x_kept + U S Vᵀ x_dropped.
    weight, x = low_rank_weight(), torch.randn(3, WIDTH)
    u, s, v = torch.linalg.svd(weight)
    mask = ActivationSparsifier(0.5)
    mask.threshold.fill_(0.7)
    mask.set_compensation(Compensation(basis=v[:4].T))
    kept = torch.where(x.abs() > 0.7, x, 0)
    expected = kept @ weight.T + (x - kept) @ (u[:, :4] * s[:4] @ v[:4]).T
    torch.testing.assert_close(mask(x) @ weight.T, expected)


def test_scap_finds_what_entries_crowd_around_and_loses_less() -> None:
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    plain = sparsify_activations(make_network(weight, Crowd()), make_batches(), {ONE: 0.6})
    scap = sparsify_activations(make_network(weight, Crowd()), make_batches(), {ONE: 0.6}, algorithm="scap")
    ((_, mask),) = named_sparsifiers(scap)
    assert mask.shift is not None
    assert float(mask.shift) == pytest.approx(2.0, abs=0.1)
    (x,) = make_batches(seed=9)[:1]
    assert error(scap, x) < 0.2 * error(plain, x)
    # As many entries are left out, though none of the layer's input is zero.
    assert measure_sparsity(scap, make_batches()).sparsity == pytest.approx(0.6, abs=0.002)
    assert torch.count_nonzero(mask(Crowd()(x))) == x.numel()


def test_r_sparse_takes_the_leading_directions_and_loses_less() -> None:
    weight, x = low_rank_weight(), make_batches(seed=9)[0]
    plain = sparsify_activations(make_network(weight, nn.Identity()), make_batches(), {ONE: 0.5}, algorithm="wina")
    made = sparsify_activations(make_network(weight, nn.Identity()), make_batches(), {ONE: 0.5}, algorithm="r-sparse")
    ((_, mask),) = named_sparsifiers(made)
    leading = torch.linalg.svd(weight)[2][:2].T
    assert mask.basis is not None
    torch.testing.assert_close(mask.basis.T @ mask.basis, torch.eye(mask.basis.shape[1]), atol=1e-5, rtol=0)
    # The two leading directions are among its.
    torch.testing.assert_close(mask.basis @ (mask.basis.T @ leading), leading, atol=1e-3, rtol=0)
    assert error(made, x) < 0.6 * error(plain, x)
    # What the low-rank part reads has been paid for: more is left out than was asked for.
    report = measure_sparsity(made, make_batches())
    reads = mask.basis.shape[1] * 2 * WIDTH / WIDTH**2
    assert report.sparsity == pytest.approx(0.5, abs=0.002)
    with torch.no_grad():
        zeros = (x.abs() <= mask.threshold).float().mean()
    assert float(zeros) == pytest.approx(0.5 + reads, abs=0.02)


def test_where_nothing_helps_zeros_stay(make_model: Any, batches: list[Any]) -> None:
    # Random weights have no leading directions.
    plain = sparsify_activations(make_model(), batches, 0.5, algorithm="wina")
    made = sparsify_activations(make_model(), batches, 0.5, algorithm="r-sparse")
    for (_, left), (_, right) in zip(named_sparsifiers(plain), named_sparsifiers(made), strict=True):
        if right.basis is None:
            torch.testing.assert_close(left.threshold, right.threshold, rtol=0.2, atol=0)
    assert any(mask.basis is None for _, mask in named_sparsifiers(made))


@pytest.mark.parametrize("algorithm", ["teal+shift", "auto+shift", "auto+low-rank", "fisher+low-rank"])
def test_they_go_with_every_allocation_and_with_rows(algorithm: str, make_model: Any, make_batches: Any) -> None:
    batches = make_batches(4, batch_size=1, length=48)
    model = sparsify_activations(make_model(), batches, 0.5, algorithm=algorithm)
    assert measure_sparsity(model, batches).sparsity == pytest.approx(0.5, abs=0.01)
    for _, mask in named_sparsifiers(model):
        assert not mask.rows_of or mask.compensation == NO_COMPENSATION


def test_a_second_call_without_them_brings_zeros_back(make_model: Any, batches: list[Any]) -> None:
    model = sparsify_activations(make_model(), batches, 0.5, algorithm="scap")
    sparsify_activations(model, batches, 0.5)
    assert all(mask.compensation == NO_COMPENSATION for _, mask in named_sparsifiers(model))


@pytest.mark.parametrize("name", ["auto+shift+low-rank", "scap+low-rank", "rows", "auto+rows", "magnitude+shift+shift"])
def test_what_does_not_go_together_is_refused(name: str) -> None:
    with pytest.raises(ActsparseError, match=r"unknown algorithm|exclude each other"):
        get_algorithm(name)
    with pytest.raises(ActsparseError, match="leave \\+shift out"):
        get_algorithm("nncf+shift")


def fill_in(model: nn.Module) -> nn.Module:
    """Give some masks a shift and some a basis, whatever the weights are."""
    generator = torch.Generator().manual_seed(3)
    bases: dict[str, torch.Tensor] = {}
    for name, mask in named_sparsifiers(model):
        random = torch.randn(in_features(model.get_submodule(name)), 3, generator=generator)
        basis = bases.setdefault(mask.site, torch.linalg.qr(random)[0])
        is_attention = "self_attn" in name
        mask.set_compensation(Compensation(shift=torch.tensor(0.125)) if is_attention else Compensation(basis=basis))
    return model


def test_a_file_a_copy_and_a_state_dict_keep_them(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    model = fill_in(sparsify_activations(make_model(), batches, 0.5))
    plain = sparsify_activations(make_model(), batches, 0.5)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        assert not torch.equal(expected, plain(**batches[0]).logits)
        save_thresholds(model, tmp_path / "file")
        assert torch.equal(load_thresholds(make_model(), tmp_path / "file")(**batches[0]).logits, expected)
        assert torch.equal(copy.deepcopy(model)(**batches[0]).logits, expected)
        dense = make_model()(**batches[0]).logits
        assert torch.equal(remove_sparsifiers(model)(**batches[0]).logits, dense)


def test_a_file_with_senseless_compensations_is_refused(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    model = fill_in(sparsify_activations(make_model(), batches, 0.5))
    save_thresholds(model, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "file")
    basis = next(key for key in tensors if key.endswith(".basis"))
    shift = next(key for key in tensors if key.endswith(".shift"))
    for key, bad in (
        (basis, torch.ones(3)),
        (basis, torch.full_like(tensors[basis], torch.nan)),
        (basis, torch.ones(5, 2)),
        (shift, torch.ones(2)),
        (shift, torch.tensor(torch.inf)),
        ("model.elsewhere.activation_sparsifier.shift", torch.tensor(1.0)),
    ):
        save_file(tensors | {key: bad}, tmp_path / "bad", metadata)
        fresh = make_model()
        with pytest.raises(ThresholdsError, match="damaged|channels"):
            load_thresholds(fresh, tmp_path / "bad")
        assert not list(named_sparsifiers(fresh))

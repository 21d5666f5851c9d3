"""Mixtures of experts: from one 3-D parameter for all experts to Linear layers that can be masked."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from actsparse.torch.offload import require_weights


class Expert(nn.Module):
    """
    One expert: down(f(gate(x)) * up(x)).

    :param gate: Its weight, [intermediate, hidden].
    :param down: [hidden, intermediate].
    """

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.act_fn = copy.deepcopy(act_fn)  # each expert's output is masked on its own
        self.down_proj = _linear(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Run the expert.

        :param x: Its tokens, [tokens, hidden].
        """
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SplitExperts(nn.ModuleList):
    """
    The experts of a block as Linear layers, on the memory of the weights that they had together.

    It computes what transformers' own loop over experts does. Experts without tokens run too, on none, so that a traced
    graph has all of them.

    :param original: Experts as transformers 5 keeps them, with `gate_up_proj` and `down_proj`, [experts, out, in].
    """

    def __init__(self, original: nn.Module) -> None:
        gate_up, down = original.gate_up_proj.detach(), original.down_proj.detach()  # type: ignore[operator, union-attr]
        halves = [pair.chunk(2) for pair in gate_up]
        super().__init__(
            Expert(gate, up, out, original.act_fn)  # type: ignore[arg-type]
            for (gate, up), out in zip(halves, down, strict=True)
        )
        # No submodule: its weights are these.
        self.__dict__["original"] = original
        self.train(original.training)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """
        Send each token to its experts.

        :param hidden_states: [tokens, hidden].
        :param top_k_index: The experts of each token, [tokens, k].
        :param top_k_weights: Their weights, [tokens, k].
        :return: The weighted sums, [tokens, hidden].
        """
        result = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, position = torch.where(top_k_index == number)
            output = expert(hidden_states[token]) * top_k_weights[token, position, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result

    @property
    def shares_memory(self) -> bool:
        """Whether the experts' weights are still those of the module they were made of."""
        original = self.__dict__.get("original")
        first: Any = self[0]
        return original is not None and first.gate_proj.weight.data_ptr() == original.gate_up_proj.data_ptr()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has weights of its own; the original's would be carried along for nothing.
        return {name: value for name, value in self.__dict__.items() if name != "original"}


def split_experts(model: nn.Module) -> list[str]:
    """
    Turn the experts that transformers keeps in 3-D parameters into Linear layers, in place.

    Only gated experts without biases, whose activation is a module, are taken; all others are left alone. Saving such a
    model's weights saves them under other names than transformers': save its thresholds instead.

    :raises ActsparseError: If weights are offloaded.
    """
    names = [name for name, module in model.named_modules() if _can_be_split(module)]
    if names:
        require_weights(model, "splitting experts into layers")
    for name in names:
        _replace(model, name, SplitExperts(model.get_submodule(name)))
    return names


def join_experts(model: nn.Module) -> None:
    """Put back what `split_experts` replaced, where the experts' weights are still the same memory."""
    for name, module in list(_split_modules(model)):
        if module.shares_memory:
            _replace(model, name, module.__dict__["original"])


@contextmanager
def with_split_experts(model: Any) -> Iterator[None]:
    """
    Split experts for what is done inside, and for good unless that fails.

    :param model: Any model; what is no torch module has no experts.
    :return: A context with the experts split; if it is left by an exception, those split here are put back.
    """
    names = split_experts(model) if isinstance(model, nn.Module) else []
    try:
        yield
    except BaseException:
        if names:
            join_experts(model)
        raise


def has_split_experts(model: nn.Module) -> bool:
    """Tell whether a model has experts that were split."""
    return next(_split_modules(model), None) is not None


def _split_modules(model: nn.Module) -> Iterator[tuple[str, SplitExperts]]:
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            yield name, module


def _can_be_split(module: nn.Module) -> bool:
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter)):
        return False
    # transformers notes on the module how it multiplies.
    is_plain = not getattr(module, "is_transposed", True) and not getattr(module, "has_bias", True)
    is_gated = getattr(module, "has_gate", False) and isinstance(getattr(module, "act_fn", None), nn.Module)
    shapes_fit = gate_up.ndim == down.ndim == 3 and gate_up.shape[1] == 2 * down.shape[2]
    has_own_gate = "_apply_gate" in vars(type(module)) and not _is_default_gate(type(module))
    return is_plain and is_gated and shapes_fit and not has_own_gate


def _is_default_gate(kind: type) -> bool:
    return getattr(vars(kind)["_apply_gate"], "__name__", "") == "_default_apply_gate"


def _linear(weight: torch.Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

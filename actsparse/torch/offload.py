"""Models larger than memory: weights that accelerate keeps elsewhere, and loads for each forward of their layer."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from actsparse.errors import ActsparseError


def is_offloaded(model: Any) -> bool:
    """
    Tell whether some of a model's weights are loaded only while their layer runs.

    :return: Whether accelerate's hooks do that for any of its layers.
    """
    return isinstance(model, nn.Module) and next(_offloading_hooks(model), None) is not None


def require_weights(model: Any, what: str) -> None:
    """
    Check that a model's weights are in memory.

    :raises ActsparseError: If some are not.
    """
    if is_offloaded(model):
        msg = f"{what} needs all weights in memory, but some are offloaded: load the model with device cpu"
        raise ActsparseError(msg)


def computing_device(layer: nn.Module) -> torch.device:
    """Tell where a layer computes."""
    device = layer.weight.device
    if device.type != "meta":
        return device  # type: ignore[return-value]
    hook = next((hook for module, hook in _offloading_hooks(layer) if module is layer), None)
    return torch.device("cpu" if hook is None else hook.execution_device)


def every_weight(model: nn.Module) -> Iterator[torch.Tensor]:
    """
    Give a model's weights one by one, those that are not in memory from where they are kept.

    :return: Each weight: those in memory in the model's order, then the others; what is on disk is read when looked at.
    """
    yield from (parameter.detach() for parameter in model.parameters() if not parameter.is_meta)
    for layer, hook in _offloading_hooks(model):
        for name, parameter in layer.named_parameters(recurse=hook.place_submodules):
            if parameter.is_meta:
                yield hook.weights_map[name]


@contextmanager
def hold_weights(module: nn.Module) -> Iterator[None]:
    """
    Load a module's weights once, for all that runs meanwhile.

    :return: A context in which its weights are in memory.
    """
    hooks = list(_offloading_hooks(module))
    with ExitStack() as stack:
        for layer, hook in hooks:
            hook.pre_forward(layer)
            # Without it, the hook neither loads before a forward nor drops after it.
            hook.offload = False
            stack.callback(_drop, layer, hook)
        yield


@contextmanager
def placeholder_weights(model: nn.Module) -> Iterator[None]:
    """
    Put zeros in the place of the weights that are not in memory, as long as only the model's graph matters.

    A graph is traced by running the model, and knows a weight by its identity, which loading it would change.
    """
    hooks = list(_offloading_hooks(model))
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for layer, hook in hooks:
            hook.offload = False
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if parameter.is_meta:
                    # One number, whatever the shape.
                    zeros = torch.zeros((), dtype=parameter.dtype, device=hook.execution_device).expand(parameter.shape)
                    replaced.append((layer, name, parameter))
                    layer._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        yield
    finally:
        for layer, name, parameter in replaced:
            layer._parameters[name] = parameter
        for _, hook in hooks:
            hook.offload = True


def _drop(layer: nn.Module, hook: Any) -> None:
    hook.offload = True
    hook.post_forward(layer, None)


def _offloading_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if getattr(part, "offload", False):
                yield module, part


def parse_memory(text: str) -> int:
    """
    Read an amount of memory.

    :param text: Such as ``6GB``, ``1.5 GiB`` or ``800MB``.
    :raises ActsparseError: If it is none.
    """
    # Not by accelerate, which takes 6gb for bits and knows no TB.
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*([KMGT])(I?)B\s*", text.upper())
    amount = float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2]) + 1) if found else 0.0
    if not 0 < amount < 2**63:
        msg = f"{text!r} is no amount of memory; write such as 6GB or 800MB"
        raise ActsparseError(msg)
    return int(amount)

"""What models and layers come wrapped in: names, masks and files are about what is inside."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# What peft calls the layer that its adapters stand beside.
_INSIDE = "base_layer"


def unwrap(model: Any) -> Any:
    """
    Find the model that names, masks and files are about.

    :param model: A torch model, or what `torch.compile` or peft made of one; anything else comes back as it is.
    """
    if not isinstance(model, nn.Module):
        return model
    inner = model._modules.get("_orig_mod")
    if inner is None and hasattr(type(model), "get_base_model"):
        # Not where adapters change what goes into the model: that would be another model.
        base = model.get_base_model()  # type: ignore[operator]
        inner = None if base is model._modules.get("base_model") else base
    return model if inner is None else unwrap(inner)


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """
    Iterate over every Linear layer of a model.

    :return: Its name and itself. A layer with adapters has the name that it had before it got them.
    """
    for name, module, is_adapter in _named_linears(model):
        if not is_adapter:
            yield name, module


def named_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the Linear layers that adapters consist of."""
    for name, module, is_adapter in _named_linears(model):
        if is_adapter:
            yield name, module


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """
    Find a module by the name that layers go by.

    :return: The module, or inside of it the layer whose adapters it holds.
    """
    module = model.get_submodule(name)
    while _has_adapters(module):
        module = module.get_submodule(_INSIDE)
    return module


def layer_name(name: str) -> str:
    """Name a layer as it was named before it got adapters."""
    return name.removesuffix(f".{_INSIDE}")


def _named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    wrappers: set[str] = set()
    for name, module in model.named_modules():
        if _has_adapters(module):
            wrappers.add(name)
        if isinstance(module, nn.Linear | Conv1D):
            own = layer_name(name)
            parts = own.split(".")
            is_inside = any(".".join(parts[:end]) in wrappers for end in range(len(parts)))
            yield own, module, is_inside


def _has_adapters(module: nn.Module) -> bool:
    return hasattr(module, "adapter_layer_names") and isinstance(module._modules.get(_INSIDE), nn.Linear | Conv1D)


@contextmanager
def as_written() -> Iterator[None]:
    """Run models as they are written, not what torch.compile made of them: it would not see a hook of a while."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes two seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

"""NNCF's own activation sparsity, called on the same model, data and layers as ours."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import nncf
import torch
from nncf.experimental.torch.sparsify_activations import TargetScope as NncfTargetScope
from nncf.experimental.torch.sparsify_activations import sparsify_activations
from nncf.experimental.torch.sparsify_activations.torch_backend import ActivationsSparsifier
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.wrapper import get_hook_storage
from torch import nn

from actsparse.scopes import match_targets
from actsparse.torch.backend import TorchBackend
from actsparse.torch.compression import quiet_nncf
from actsparse.torch.insertion import record_calls
from actsparse.torch.layers import find_layers, trace_graph


def find_layer_names(model: nn.Module, example: Any) -> dict[str, str]:
    """Map NNCF's node names to ours."""
    return {node: layer.name for layer in find_layers(model, trace_graph(model, example)) for node in layer.nodes}


def translate_targets(
    model: nn.Module, example: Any, targets: Mapping[Any, float] | float, ignored_scope: Any = None
) -> dict[Any, float]:
    """
    Ask NNCF for the layers that our scopes select: it knows neither roles nor a single number.

    :param targets: Target sparsities as `actsparse.sparsify_activations` takes them.
    """
    found = TorchBackend(model).layers(example)
    nodes: dict[float, list[str]] = {}
    by_name = match_targets(targets, ignored_scope, found)
    for layer in found.all:
        if layer.name in by_name:
            nodes.setdefault(by_name[layer.name].sparsity, []).extend(layer.nodes)
    return {NncfTargetScope(names=names): target for target, names in nodes.items()}


def sparsify_with_nncf(model: nn.Module, batches: Iterable[Any], targets: Mapping[Any, float]) -> nn.Module:
    """
    Call NNCF's `sparsify_activations`.

    :param model: The model; NNCF changes it and does not change it back.
    """
    with quiet_nncf():
        return sparsify_activations(model, nncf.Dataset(batches), dict(targets))


def named_nncf_sparsifiers(model: nn.Module) -> dict[str, ActivationsSparsifier]:
    """Find NNCF's masks."""
    hooks = get_hook_storage(model).named_hooks()
    return {decode_hook_name(name)[1]: hook for name, hook in hooks if isinstance(hook, ActivationsSparsifier)}


@contextmanager
def count_nncf_zeros(model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """
    Count zeros behind NNCF's masks while the model runs.

    :return: A context with a function that tells the share of zeros so far by node name.
    """
    zeros: dict[str, int] = {}
    entries: dict[str, int] = {}

    def count(name: str, _args: Any, _kwargs: Any, masked: torch.Tensor) -> None:
        zeros[name] = zeros.get(name, 0) + masked.numel() - int(torch.count_nonzero(masked))
        entries[name] = entries.get(name, 0) + masked.numel()

    with ExitStack() as stack:
        for name, sparsifier in named_nncf_sparsifiers(model).items():
            stack.enter_context(record_calls(sparsifier, partial(count, name)))
        yield lambda: {name: zeros[name] / entries[name] for name in zeros}

"""Putting masks on layers and taking them off; the only file that registers hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from actsparse.calibration import Passes
from actsparse.mask import Mask
from actsparse.torch.offload import computing_device
from actsparse.torch.sparsifier import ActivationSparsifier
from actsparse.torch.wrappers import as_written, get_layer, layer_name

CHILD = "activation_sparsifier"


def mask_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """
    Run a layer's mask before the layer: the forward pre-hook of every masked layer.

    It finds the mask through its argument instead of closing over it, so that copies and pickles of the model use
    their own masks.

    :param kwargs: None in a pickle of earlier versions, whose hooks knew no keywords.
    """
    mask = getattr(module, CHILD)
    return (mask(args[0]), *args[1:]) if kwargs is None else replace_input(mask, args, kwargs)


def mask_output(module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Run a mask after an activation function: the forward hook of every function whose output is masked."""
    return getattr(module, CHILD)(output)


def insert_sparsifier(model: nn.Module, name: str, sparsifier: ActivationSparsifier) -> None:
    """
    Mask a layer's input, or an activation function's output, replacing the mask that is there.

    :param name: The Linear layer, or for a mask of rows the activation function.
    :param sparsifier: The mask; moved to the device of the layer and put in the mode of the module.
    """
    module = get_layer(model, name)
    device = computing_device(get_layer(model, sparsifier.rows_of or name))
    had_mask = CHILD in module._modules
    module.add_module(CHILD, sparsifier.to(device).train(module.training))
    if had_mask:
        return
    if "forward" not in vars(module):
        # For torch.compile, whose guards do not look at hooks, but at this: what it made of a module without a mask
        # does not run for one with a mask, nor the other way round.
        module.forward = module.forward
    if sparsifier.rows_of:
        module.register_forward_hook(mask_output)
    else:
        module.register_forward_pre_hook(mask_input, with_kwargs=True)


def remove_sparsifier(module: nn.Module) -> None:
    """Take the mask off one layer or activation function."""
    module._modules.pop(CHILD, None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (mask_input, mask_output):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward


def named_sparsifiers(model: nn.Module) -> Iterator[tuple[str, ActivationSparsifier]]:
    """
    Iterate over a model's masks by layer.

    :return: The name of each layer whose weights a mask makes useless, and the mask, in the model's order.
    """
    for name, sparsifier in placed_sparsifiers(model):
        yield sparsifier.rows_of or name, sparsifier


def placed_sparsifiers(model: nn.Module) -> Iterator[tuple[str, ActivationSparsifier]]:
    """
    Iterate over a model's masks by place.

    :return: The name of each module with a mask, a layer or an activation function, and the mask.
    """
    for name, module in model.named_modules():
        sparsifier = module._modules.get(CHILD)
        if isinstance(sparsifier, ActivationSparsifier):
            yield layer_name(name), sparsifier


def named_masks(model: nn.Module, *, only_active: bool = False) -> dict[str, Mask]:
    """
    Describe a model's masks by layer.

    :param only_active: Whether to leave out masks that are suspended.
    """
    placed = placed_sparsifiers(model)
    return {s.rows_of or place: s.to_mask(place) for place, s in placed if s.is_active or not only_active}


@contextmanager
def suspend_sparsifiers(sparsifiers: Iterable[ActivationSparsifier]) -> Iterator[None]:
    """Let masks pass everything for a while."""
    states = [(sparsifier, sparsifier.is_active) for sparsifier in sparsifiers]
    try:
        for sparsifier, _ in states:
            sparsifier.is_active = False
        yield
    finally:
        for sparsifier, was_active in states:
            sparsifier.is_active = was_active


@contextmanager
def intercept_outputs(
    sparsifiers: Mapping[str, ActivationSparsifier], intercept: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """
    See, and replace, what masks hand on to their layers.

    :param intercept: Called with the layer name and the mask's output; what it returns goes to the layer.
    """
    handles: list[Any] = []
    try:
        for name, sparsifier in sparsifiers.items():
            hook = partial(_intercept_output, intercept, name)
            handles.append(sparsifier.register_forward_hook(hook))
        with as_written():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def intercept_inputs(
    model: nn.Module, layers: Iterable[str], intercept: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """
    See, and replace, what layers read.

    :param intercept: Called with the layer name and its input; what it returns the layer gets.
    """
    handles: list[Any] = []
    try:
        for name in layers:
            hook = partial(_intercept_input, intercept, name)
            handles.append(get_layer(model, name).register_forward_pre_hook(hook, with_kwargs=True))
        with as_written():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record_calls(module: nn.Module, record: Callable[[tuple[Any, ...], dict[str, Any], Any], None]) -> Iterator[None]:
    """
    See what a module is called with and what it gives.

    :param record: Called with its positional arguments, its keyword arguments and its output.
    """

    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record(args, kwargs, output)

    handle = module.register_forward_hook(see, with_kwargs=True)
    try:
        with as_written():
            yield
    finally:
        handle.remove()


@contextmanager
def count_passes(model: nn.Module, passes: Passes) -> Iterator[None]:
    """Count how often a model runs."""

    def see(_args: Any, _kwargs: Any, _output: Any) -> None:
        passes.forwards += 1
        passes.backwards += torch.is_grad_enabled()

    with record_calls(model, see):
        yield


@contextmanager
def call_before(module: nn.Module, call: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call something whenever a module is about to run."""
    handle = module.register_forward_pre_hook(lambda module, _args: call(module))
    try:
        with as_written():
            yield
    finally:
        handle.remove()


def watch_gradient(x: torch.Tensor, take: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
    """
    See the gradient that some readers of a tensor send back to it.

    :param take: Called with the gradient; None leaves it to be asked for.
    :return: A tensor of the same values for these readers: the gradient is theirs alone.
    """
    copy = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    if take is not None:
        copy.register_hook(take)
    return copy


def replace_input(
    replace: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    Replace what a layer reads, its first argument whether it was given by keyword or not.

    :param replace: Called with the input.
    :return: The layer's arguments.
    """
    if args:
        return (replace(args[0]), *args[1:]), kwargs
    keyword, x = next(iter(kwargs.items()))
    return args, {**kwargs, keyword: replace(x)}


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find what a module reads: its first argument, or None where it has none."""
    return next(iter((*args, *kwargs.values())), None)


def _intercept_input(
    intercept: Callable[[str, torch.Tensor], torch.Tensor],
    name: str,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return replace_input(partial(intercept, name), args, kwargs)


def _intercept_output(
    intercept: Callable[[str, torch.Tensor], torch.Tensor], name: str, _module: nn.Module, _args: Any, x: torch.Tensor
) -> torch.Tensor:
    # An expert that no token goes to has nothing to see.
    return intercept(name, x) if x.numel() else x

"""The activation functions that gate feed-forward networks: where masks of whole neurons sit."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from actsparse.errors import ScopeError
from actsparse.scopes.layers import Layer
from actsparse.scopes.roles import is_alone
from actsparse.torch.insertion import input_of, record_calls
from actsparse.torch.running import evaluation_mode, run_model
from actsparse.torch.sparsifier import ActivationSparsifier


def find_gate_functions(
    model: nn.Module, example: Any, matched: Iterable[Layer], layers: Iterable[Layer]
) -> dict[str, str]:
    """
    Find the module f of each gated feed-forward network down(f(gate(x)) * up(x)).

    Where f(gate(x)) is zero, a row of up is useless. Networks whose gate and up are one layer, or that have no gate,
    are left out.

    :return: The name of f by the name of up.
    :raises ScopeError: If f is no module of its own.
    """
    layers = list(layers)
    gates = {layer.inputs: layer.name for layer in layers if is_alone("ffn.gate", layer.roles)}
    networks = {x.name: gates[x.inputs] for x in matched if is_alone("ffn.up", x.roles) and x.inputs in gates}
    if not networks:
        return {}
    functions = _find_readers(model, example, set(networks.values()))
    if functions.keys() < {*networks.values()}:
        downs = {layer.name for layer in layers if "ffn.down" in layer.roles}
        by_up = _find_factors(model, example, {up for up, gate in networks.items() if gate not in functions}, downs)
        functions |= {networks[up]: function for up, function in by_up.items()}
    for up, gate in networks.items():
        if gate not in functions:
            msg = f"no module computes the activation function between {gate} and {up}: its output cannot be masked"
            raise ScopeError(msg)
    return {up: functions[gate] for up, gate in networks.items()}


def _find_readers(model: nn.Module, example: Any, gates: set[str]) -> dict[str, str]:
    """Find the modules without parameters that read what a gate has just computed."""
    found: dict[str, str] = {}
    # Held weakly: of a whole forward, all gates' outputs together may be larger than memory.
    last: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()

    def watch(name: str, module: nn.Module) -> Any:
        if name in gates:
            return record_calls(module, lambda _args, _kwargs, output: last.__setitem__(name, output))
        return record_calls(module, lambda args, kwargs, _output: see(name, input_of(args, kwargs)))

    def see(name: str, x: Any) -> None:
        for gate, output in last.items():
            if x is output:
                found[gate] = name

    _run_watched(model, example, gates, watch)
    return _unshared(found)


def _find_factors(model: nn.Module, example: Any, ups: set[str], downs: set[str]) -> dict[str, str]:
    """
    Find the modules without parameters whose output times up's is what a down projection reads.

    For networks that compute something between the gate and its activation function, as Gemma 3n's do.
    """
    found: dict[str, str] = {}
    outputs: dict[str, torch.Tensor] = {}
    multiplied: dict[str, torch.Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        if name in downs:
            return record_calls(module, lambda args, kwargs, _output: see(input_of(args, kwargs)))
        kept = multiplied if name in ups else outputs
        return record_calls(module, lambda _args, _kwargs, output: kept.__setitem__(name, output))

    def see(x: torch.Tensor) -> None:
        for up, rows in multiplied.items():
            for function, factor in outputs.items():
                is_shaped = isinstance(factor, torch.Tensor) and factor.shape == rows.shape == x.shape
                if is_shaped and torch.equal(factor * rows, x):
                    found[up] = function
        outputs.clear()
        multiplied.clear()

    _run_watched(model, example, ups | downs, watch)
    return _unshared(found)


def _run_watched(
    model: nn.Module, example: Any, layers: set[str], watch: Callable[[str, nn.Module], AbstractContextManager[None]]
) -> None:
    """Run a model once, watching some layers and all modules without parameters."""
    with ExitStack() as stack, evaluation_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            if name in layers or _is_function(module):
                stack.enter_context(watch(name, module))
        run_model(model, example)


def _unshared(found: dict[str, str]) -> dict[str, str]:
    # A function that several gates share cannot be masked for one of them.
    return found if len(set(found.values())) == len(found) else {}


def _is_function(module: nn.Module) -> bool:
    is_mask = isinstance(module, ActivationSparsifier)
    has_parts = any(not isinstance(child, ActivationSparsifier) for child in module.children())
    return not is_mask and not has_parts and next(module.parameters(), None) is None

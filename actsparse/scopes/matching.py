"""From scopes to layers: NNCF's rules on graph node names, the same rules on module names, and roles."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import nncf
from nncf.common.graph.graph import NNCFGraph
from nncf.scopes import get_matched_ignored_scope_info

from actsparse.errors import ScopeError, nearest
from actsparse.scopes.layers import Layer, Layers
from actsparse.scopes.target_scope import TargetScope, compile_pattern, quote

# Between the parts of a name.
_SEPARATOR = re.compile(r"[./]")
# What a pattern does not say in letters: classes, counts, the heads of groups.
_SIGNS = re.compile(r"\\[a-zA-Z]|\[[^]]*\]|\{[^}]*\}|\(\?[P<]*")


_RULES = ("names", "patterns", "types", "roles", "subgraphs")


class Target(NamedTuple):
    """
    What one layer is to become.

    :param scope: Which scope that is, counted from 0.
    """

    sparsity: float
    scope: int


def validate_targets(targets: object, ignored_scope: object) -> None:
    """
    Check what can be checked before a model is traced.

    :param ignored_scope: The scope to leave out, or None.
    :raises ScopeError: If a target is not a number in [0, 1] or a scope is not a scope.
    """
    if isinstance(targets, Mapping):
        if not targets:
            msg = "target_sparsity_by_scope is empty: give at least one scope, or one number for all block layers"
            raise ScopeError(msg)
        for scope, target in targets.items():
            _require_scope(scope, "a key of target_sparsity_by_scope")
            _require_sparsity(target, f" for {describe_scope(scope)}")
    else:
        _require_sparsity(targets, "")
    if ignored_scope is not None:
        _require_scope(ignored_scope, "ignored_scope")


def match_targets(
    targets: Mapping[Any, float] | float, ignored_scope: nncf.IgnoredScope | None, found: Layers
) -> dict[str, Target]:
    """
    Resolve scopes into layers.

    :param targets: Target sparsity for each scope, or one number for every layer of the model's blocks.
    :param ignored_scope: Layers to leave out, or None.
    :raises ScopeError: If a rule matches nothing, a name or a scope matches no Linear layer, a layer is matched by two
        scopes, or no layer is left.
    """
    graph, layers = found.graph, found.all
    if not isinstance(targets, Mapping):
        if not found.of_blocks:
            reason = found.others or f"the model's Linear layers: {_examples(layers)}"
            msg = f"a single target sparsity is for the model's blocks, which have no Linear layer to mask; {reason}"
            raise ScopeError(msg)
        targets = {TargetScope(names=[layer.name for layer in found.of_blocks]): targets}
    ignored = _match_scope(ignored_scope, graph, layers) if ignored_scope is not None else set()
    if ignored_scope is not None and not ignored and ignored_scope.validate and _has_rules(ignored_scope):
        rules = describe_scope(ignored_scope)
        msg = f"ignored_scope {rules} protects nothing: no Linear layer fits; some that there are: {_examples(layers)}"
        raise ScopeError(msg)
    matched: dict[str, Target] = {}
    owner: dict[str, nncf.IgnoredScope] = {}
    for number, (scope, target) in enumerate(targets.items()):
        names = _match_scope(scope, graph, layers)
        if not names and scope.validate:
            msg = f"{describe_scope(scope)} matches no Linear layer; some that there are: {_examples(layers)}"
            raise ScopeError(msg)
        for name in names - ignored:
            if name in matched:
                scopes = f"{describe_scope(owner[name])} and {describe_scope(scope)}"
                msg = f"layer {name} is matched by multiple items in `target_sparsity_by_scope`: {scopes}"
                raise ScopeError(msg)
            if name in found.bypassed:
                msg = f"{name} cannot be masked: the model reads its weights without calling it, as"
                msg += " torch.nn.MultiheadAttention does with out_proj; leave it out by ignored_scope"
                raise ScopeError(msg)
            matched[name], owner[name] = Target(float(target), number), scope
    if not matched:
        msg = f"No layers to conduct activation sparsification; the model's Linear layers: {_examples(layers)}"
        raise ScopeError(msg)
    return {layer.name: matched[layer.name] for layer in layers if layer.name in matched}


def describe_scope(scope: nncf.IgnoredScope) -> str:
    """
    Say in one line what a scope asks for.

    :return: Its rules, without those that are empty.
    """
    rules = [(kind, list(getattr(scope, kind, ()))) for kind in _RULES]
    return f"TargetScope({', '.join(f'{kind}={values}' for kind, values in rules if values)})"


def _has_rules(scope: nncf.IgnoredScope) -> bool:
    return any(getattr(scope, kind, ()) for kind in _RULES)


def _match_scope(scope: nncf.IgnoredScope, graph: NNCFGraph, layers: Sequence[Layer]) -> set[str]:
    types = {node.node_name: node.node_type for node in graph.get_all_nodes()}
    modules = {layer.name for layer in layers}
    names = types.keys() | modules
    by_node = {node: layer.name for layer in layers for node in layer.nodes}
    found: set[str] = set()
    for name in scope.names:
        hits = {name} & names
        _require_match(hits, f"name {quote(name)}", name, scope, layers)
        if scope.validate and hits - by_node.keys() - modules:
            msg = f"{quote(name)} names no Linear layer but {types[name]!r}; some layers are: {_examples(layers)}"
            raise ScopeError(msg)
        found |= hits
    for pattern in scope.patterns:
        match = compile_pattern(pattern).match
        hits = {name for name in names if match(name)}
        _require_match(hits, f"pattern {quote(pattern)}", _letters_of(pattern), scope, layers)
        found |= hits
    for role in getattr(scope, "roles", ()):
        hits = {layer.name for layer in layers if role in layer.roles}
        there = sorted({r for layer in layers for r in layer.roles})
        if not hits and scope.validate:
            msg = f"role {role!r} matches no layer of this model; roles found: {', '.join(there) or 'none'}"
            raise ScopeError(msg)
        found |= hits
    found |= _match_types_and_subgraphs(scope, graph)
    return {by_node.get(name, name) for name in found} & modules


def _match_types_and_subgraphs(scope: nncf.IgnoredScope, graph: NNCFGraph) -> set[str]:
    rest = nncf.IgnoredScope(types=list(scope.types), subgraphs=list(scope.subgraphs))
    try:
        known, matches = get_matched_ignored_scope_info(rest, [graph])
    except (nncf.InternalError, RuntimeError, KeyError) as error:
        msg = f"{describe_scope(scope)}: {' '.join(str(error).split())}"
        raise ScopeError(msg) from None
    if scope.validate:
        for kind in rest.types:
            if kind not in known.types:
                all_types = sorted({node.node_type for node in graph.get_all_nodes()})
                msg = f"type {kind!r} matches nothing in this model; nearest: {nearest(kind, all_types)}"
                raise ScopeError(msg)
        for subgraph in rest.subgraphs:
            if subgraph not in known.subgraphs:
                msg = f"{subgraph} matches nothing in this model"
                raise ScopeError(msg)
    return set().union(*matches.values())


def _require_match(hits: set[str], rule: str, text: str, scope: nncf.IgnoredScope, layers: Sequence[Layer]) -> None:
    if hits or not scope.validate:
        return
    candidates = [n for layer in layers for n in (layer.name, *layer.nodes)]
    count = len(_SEPARATOR.split(text))

    def end(name: str) -> str:
        """As many parts as the text has: what stands before them may have been left out."""
        return ".".join(_SEPARATOR.split(name)[-count:])

    msg = f"{rule} matches nothing in this model; nearest: {nearest(end(text), candidates, judged_by=end)}"
    raise ScopeError(msg)


def _letters_of(pattern: str) -> str:
    letters = _SIGNS.sub("", pattern.replace(r"\d", "0"))
    parts = (re.sub(r"\W", "", part) for part in _SEPARATOR.split(letters))
    return ".".join(filter(None, parts))


def _examples(layers: Sequence[Layer]) -> str:
    names = [layer.name for layer in layers]
    return ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")


def _require_scope(scope: object, where: str) -> None:
    if not isinstance(scope, nncf.IgnoredScope):
        msg = f"{where} must be a TargetScope or one of NNCF's scopes, not {type(scope).__name__}: {scope!r}"
        raise ScopeError(msg)


def _require_sparsity(target: object, where: str) -> None:
    is_number = isinstance(target, Real) and not isinstance(target, bool)
    if not is_number or math.isnan(float(target)) or not 0.0 <= float(target) <= 1.0:  # type: ignore[arg-type]
        msg = f"target sparsity{where} should be a number in range [0, 1], not {target!r}"
        raise ScopeError(msg)

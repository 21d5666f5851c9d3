"""The caller's way to say which layers: NNCF's scope, plus roles."""

import re
import warnings
from dataclasses import dataclass, field

import nncf

from actsparse.errors import ScopeError, nearest

ROLES = ("attention.qkv", "attention.out", "ffn.gate", "ffn.up", "ffn.in", "ffn.down", "head")


@dataclass
class TargetScope(nncf.IgnoredScope):
    r"""
    Select layers by name, regular expression, operation type, subgraph or role.

    Names and patterns are compared with NNCF graph node names (``model/mlp/up_proj/linear/0``) and with
    module names (``model.layers.0.mlp.up_proj``). Patterns are anchored at the start only (``re.match``), as in NNCF.

    For instance::

        TargetScope(patterns=[".*up_proj.*", ".*gate_proj.*"])
        TargetScope(patterns=[r"model\.layers\.(0|1)\.mlp\..*"])
        TargetScope(roles=("ffn.up", "ffn.gate"))

    :param names: Node or module names.
    :param patterns: Regular expressions for node or module names.
    :param types: NNCF operation types, such as ``linear``.
    :param subgraphs: ``nncf.Subgraph`` objects; every node between their inputs and outputs matches.
    :param validate: Whether a rule that matches nothing is an error.
    :param roles: Any of ``attention.qkv``, ``attention.out``, ``ffn.gate``, ``ffn.up``, ``ffn.in``, ``ffn.down``,
        ``head``, found on the model's graph, whatever the layers are called.
    :raises ScopeError: If a role is unknown, a pattern is not a regular expression, or what should be a list of strings
        is not one.
    """

    roles: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("names", "patterns", "types", "roles"):
            _require_strings(name, getattr(self, name))
        self.roles = tuple(self.roles)
        for role in self.roles:
            if role not in ROLES:
                msg = f"unknown role {role!r}; nearest: {nearest(role, ROLES)}; all roles: {', '.join(ROLES)}"
                raise ScopeError(msg)
        for pattern in self.patterns:
            compile_pattern(pattern)

    def __hash__(self) -> int:
        subgraphs = frozenset((frozenset(s.inputs), frozenset(s.outputs)) for s in self.subgraphs)
        rules = (self.names, self.patterns, self.types, self.roles)
        return hash((*(frozenset(r) for r in rules), subgraphs, self.validate))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """
    Compile a caller's regular expression.

    :raises ScopeError: If it is not one.
    """
    try:
        with warnings.catch_warnings():
            # Of what may mean something else in a later Python.
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        msg = f"{quote(pattern)} is not a regular expression: {error}"
        raise ScopeError(msg) from None


def quote(text: str) -> str:
    """Quote a pattern or a name for a message."""
    return repr(text if len(text) <= 200 else text[:200] + "…")


def _require_strings(name: str, values: object) -> None:
    if isinstance(values, str):
        what = f"one string: {values!r}"
    elif not isinstance(values, list | tuple | set | frozenset):
        what = repr(values)
    elif others := [value for value in values if not isinstance(value, str)]:
        what = f"a list with {others[0]!r}"
    else:
        return
    msg = f"TargetScope({name}=…) takes a list of strings, not {what}"
    raise ScopeError(msg)

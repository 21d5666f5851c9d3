"""What a scope may say, before any model is seen."""

from dataclasses import dataclass, field
from typing import Any

import nncf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nncf.experimental.torch.sparsify_activations import TargetScope as NncfTargetScope

from actsparse import ScopeError, TargetScope
from actsparse.scopes import ROLES
from actsparse.scopes.target_scope import compile_pattern


def test_it_takes_the_arguments_of_nncfs_scope_in_their_order() -> None:
    arguments = (["a"], [".*b"], ["linear"], [nncf.Subgraph(["x"], ["y"])], False)
    ours, theirs = TargetScope(*arguments), NncfTargetScope(*arguments)
    for name in ("names", "patterns", "types", "subgraphs", "validate"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours, nncf.IgnoredScope)


def test_equal_scopes_are_one_key() -> None:
    subgraphs = [nncf.Subgraph(["x"], ["y"])]
    one = TargetScope(names=["a"], patterns=[".*b"], roles=("ffn.up",), subgraphs=subgraphs)
    same = TargetScope(names=["a"], patterns=[".*b"], roles=["ffn.up"], subgraphs=subgraphs)  # pyright: ignore
    other = TargetScope(names=["a"], patterns=[".*b"], roles=("ffn.gate",), subgraphs=subgraphs)
    assert one == same
    assert len({one: 1, same: 2, other: 3}) == 2


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_accepted_in_a_list_and_in_a_tuple(role: str) -> None:
    assert TargetScope(roles=[role]).roles == TargetScope(roles=(role,)).roles == (role,)  # pyright: ignore


@dataclass(frozen=True)
class BadScope:
    """Arguments that no scope can have, and what the error says of them."""

    name: str
    message: str
    arguments: dict[str, Any] = field(default_factory=dict)


BAD_SCOPES = [
    BadScope("unknown role", r"unknown role 'ffn\.upp'; nearest: ffn\.up", {"roles": ("ffn.upp",)}),
    BadScope("one pattern", r"takes a list of strings, not one string: '\.\*'", {"patterns": ".*"}),
    BadScope("one name", "takes a list of strings, not one string: 'lm_head'", {"names": "lm_head"}),
    BadScope("one role", "takes a list of strings, not one string: 'ffn.up'", {"roles": "ffn.up"}),
    BadScope("one type", "takes a list of strings, not one string: 'linear'", {"types": "linear"}),
    BadScope("open group", r"'\(' is not a regular expression", {"patterns": ["("]}),
    BadScope("huge repeat", "is not a regular expression", {"patterns": ["a{99999999999999999999}"]}),
    BadScope("deep pattern", "is not a regular expression", {"patterns": ["(" * 2400 + "a" + ")" * 2400]}),
    BadScope("number as a pattern", "takes a list of strings, not a list with 1", {"patterns": [1]}),
    BadScope("number as a name", "takes a list of strings, not a list with 1", {"names": [1]}),
    BadScope("nothing as a type", "takes a list of strings, not a list with None", {"types": [None]}),
    BadScope("no list", "takes a list of strings, not None", {"names": None}),
]


@pytest.mark.parametrize("case", BAD_SCOPES, ids=lambda case: case.name)
def test_what_no_scope_can_be_is_refused_in_one_line(case: BadScope) -> None:
    with pytest.raises(ScopeError, match=case.message) as caught:
        TargetScope(**case.arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.filterwarnings("ignore::FutureWarning")
@given(pattern=st.text(max_size=40))
def test_any_text_is_a_pattern_or_refused_in_one_line(pattern: str) -> None:
    try:
        compile_pattern(pattern)
    except ScopeError as error:
        assert len(str(error).splitlines()) == 1

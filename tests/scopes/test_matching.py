"""Names and patterns match what NNCF matches, and module names besides."""

import math
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import pytest
from nncf.experimental.torch.sparsify_activations import TargetScope as NncfTargetScope
from nncf.experimental.torch.sparsify_activations.target_scope import get_target_node_names_from_target_scope

from actsparse import ScopeError, TargetScope
from actsparse.scopes import Layers, match_targets
from actsparse.scopes.matching import describe_scope, validate_targets
from actsparse.torch.backend import TorchBackend


@pytest.fixture(scope="module")
def found(make_model: Any, make_batches: Any) -> Layers:
    return TorchBackend(make_model("llama")).layers(make_batches()[0])


def match(found: Layers, scope: Any, ignored: Any = None) -> set[str]:
    return set(match_targets({scope: 0.5}, ignored, found))


# ---- Node names: NNCF decides


NODE_RULES: list[dict[str, Any]] = [
    {"names": ["model/mlp/up_proj/linear/0", "lm_head/linear/0"]},
    {"patterns": [".*up_proj.*"]},
    {"patterns": ["model/mlp"]},
    {"patterns": [".*/linear/1$"]},
    {"patterns": [r"model/self_attn/[qk]_proj/linear/\d", "lm_head.*"]},
    {"patterns": [".*linear.*"], "names": ["model/mlp/up_proj/linear/0"]},
    {"types": ["linear"]},
    {"types": ["linear", "silu"]},
    {"subgraphs": [nncf.Subgraph(["model/mlp/gate_proj/linear/0"], ["model/mlp/down_proj/linear/0"])]},
    {"subgraphs": [nncf.Subgraph(["model/mlp/up_proj/linear/1"], ["lm_head/linear/0"])], "patterns": [".*q_proj.*"]},
]


@pytest.mark.parametrize("rules", NODE_RULES, ids=str)
def test_node_names_match_as_in_nncf(rules: dict[str, Any], found: Layers) -> None:
    nodes = get_target_node_names_from_target_scope(NncfTargetScope(**rules), found.graph)
    expected = {layer.name for layer in found.all if nodes.intersection(layer.nodes)}
    assert expected
    assert match(found, TargetScope(**rules)) == expected
    assert match(found, NncfTargetScope(**rules)) == expected


@pytest.mark.parametrize(
    "rules",
    [{"names": ["up_proj"]}, {"patterns": ["up_proj"]}, {"patterns": ["linear/0$"]}, {"types": ["Linear"]}],
    ids=str,
)
def test_what_nncf_finds_nowhere_is_an_error_here_too(rules: dict[str, Any], found: Layers) -> None:
    with pytest.raises(nncf.ValidationError):
        get_target_node_names_from_target_scope(NncfTargetScope(**rules), found.graph)
    with pytest.raises(ScopeError, match="matches nothing in this model; nearest: "):
        match(found, TargetScope(**rules))


@pytest.mark.parametrize("rules", NODE_RULES, ids=str)
def test_ignored_scopes_match_as_in_nncf(rules: dict[str, Any], found: Layers) -> None:
    everything = TargetScope(types=["linear"])
    ignored = match(found, TargetScope(**rules))
    rest = {layer.name for layer in found.all} - ignored
    for scope in (TargetScope(**rules), nncf.IgnoredScope(**rules)):
        if rest:
            assert match(found, everything, scope) == rest
        else:
            with pytest.raises(ScopeError, match="No layers to conduct activation sparsification"):
                match(found, everything, scope)


# ---- Module names and roles: ours


@dataclass(frozen=True)
class OurCase:
    """A scope that NNCF has no word for, and the layers that it matches."""

    scope: TargetScope
    layers: set[str]


UP, DOWN = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
OUR_CASES = [
    OurCase(TargetScope(names=[UP.format(1)]), {UP.format(1)}),
    OurCase(TargetScope(patterns=[r"model\.layers\.0\.mlp\.(up|down)_proj"]), {UP.format(0), DOWN.format(0)}),
    OurCase(TargetScope(roles=("ffn.up",)), {UP.format(0), UP.format(1)}),
    OurCase(TargetScope(roles=("ffn.down",), names=[UP.format(0)]), {UP.format(0), DOWN.format(0), DOWN.format(1)}),
    OurCase(TargetScope(names=["model/mlp/up_proj/linear/1"], patterns=[".*layers.1.*up"]), {UP.format(1)}),
    OurCase(TargetScope(names=["nothing", UP.format(0)], validate=False), {UP.format(0)}),
]


@pytest.mark.parametrize("case", OUR_CASES, ids=lambda case: describe_scope(case.scope))
def test_module_names_and_roles_match(case: OurCase, found: Layers) -> None:
    assert match(found, case.scope) == case.layers


def test_layers_come_in_call_order_with_their_targets(found: Layers) -> None:
    targets = {TargetScope(roles=("ffn.down",)): 1, TargetScope(roles=("attention.qkv",)): 0.25}
    matched = match_targets(targets, None, found)
    assert list(matched) == [layer.name for layer in found.all if layer.name in matched]
    assert {name.rpartition(".")[2]: target for name, target in matched.items()} == {
        "q_proj": (0.25, 1),
        "k_proj": (0.25, 1),
        "v_proj": (0.25, 1),
        "down_proj": (1.0, 0),
    }


def test_a_layer_matched_twice_is_refused_with_both_scopes(found: Layers) -> None:
    targets = {TargetScope(roles=("ffn.up",)): 0.5, TargetScope(patterns=[".*layers.1.*"]): 0.3}
    message = (
        r"layer model\.layers\.1\.mlp\.up_proj is matched by multiple items in `target_sparsity_by_scope`: "
        r"TargetScope\(roles=\['ffn\.up'\]\) and TargetScope\(patterns=\['\.\*layers\.1\.\*'\]\)"
    )
    with pytest.raises(ScopeError, match=message):
        match_targets(targets, None, found)
    ignored = TargetScope(names=[UP.format(1)])
    assert match_targets(targets, ignored, found)[UP.format(0)].sparsity == 0.5


def test_a_layer_matched_twice_by_one_scope_is_matched_once(found: Layers) -> None:
    scope = TargetScope(names=[UP.format(0)], patterns=[".*layers.0.*up_proj"])
    assert match(found, scope) == {UP.format(0)}


@dataclass(frozen=True)
class BadCase:
    """A scope that this model has nothing for, and what the error says of it."""

    name: str
    scope: Any
    message: str


BAD_CASES = [
    BadCase("name", TargetScope(names=["model.layers.0.mlp.upproj"]), "nearest: model.layers.0.mlp.up_proj"),
    BadCase("pattern", TargetScope(patterns=["mlp/up"]), "pattern 'mlp/up' matches nothing in this model; nearest: "),
    BadCase("no prefix", TargetScope(names=["mlp.up_proj"]), r"nearest: model\.layers\.0\.mlp\.up_proj"),
    BadCase("no prefix, mistyped", TargetScope(names=["up_prj"]), r"nearest: model\.layers\.0\.mlp\.up_proj"),
    BadCase("node's name", TargetScope(names=["mlp/up_prj/linear/0"]), "nearest: model/mlp/up_proj/linear/0"),
    *(
        BadCase(pattern, TargetScope(patterns=[pattern]), rf"nearest: model\.layers\.0\.{nearest}")
        for pattern, nearest in {
            ".*up_prj.*": r"mlp\.up_proj",
            r".*gate_prj$": r"mlp\.gate_proj",
            r"model\.layers\.\d+\.mlp\.down_prj": r"mlp\.down_proj",
            r".*\.mlp\.(?:up|gate)_prj": r"mlp\.gate_proj",
            r"^.*self_atn\.[qk]_prj[a-z]{1,3}": r"self_attn\.",
        }.items()
    ),
    BadCase("only signs", TargetScope(patterns=["^$"]), "nearest: model"),
    BadCase("type", TargetScope(types=["lineer"]), "type 'lineer' matches nothing in this model; nearest: linear"),
    BadCase("role", TargetScope(roles=("ffn.in",)), "role 'ffn.in' matches no layer of this model; roles found: att"),
    BadCase("embedding", TargetScope(patterns=[".*embed_tokens.*"]), "matches no Linear layer; some that there are"),
    BadCase("subgraph", TargetScope(subgraphs=[nncf.Subgraph(["x"], ["y"])]), "Could not find a node x"),
    BadCase("NNCF's pattern", nncf.IgnoredScope(patterns=["("], validate=False), "is not a regular expression"),
    BadCase("not validated", TargetScope(names=["x"], validate=False), "No layers to conduct activation spars"),
    BadCase("weight", TargetScope(names=["lm_head.weight", UP.format(0)]), "names no Linear layer but"),
    BadCase("empty", TargetScope(), r"TargetScope\(\) matches no Linear layer; some that there are: model"),
]


@pytest.mark.parametrize("case", BAD_CASES, ids=lambda case: case.name)
def test_a_scope_without_layers_is_refused_in_one_line(case: BadCase, found: Layers) -> None:
    # A pair, as NNCF's IgnoredScope cannot be the key of a dict.
    targets: Any = _Pairs([(case.scope, 0.5)])
    with pytest.raises(ScopeError, match=case.message) as caught:
        match_targets(targets, None, found)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rules",
    [{"names": ["lm_head.weight"]}, {"types": ["silu"]}, {"patterns": [".*layernorm.*"]}],
    ids=str,
)
@pytest.mark.parametrize("kind", [TargetScope, nncf.IgnoredScope])
def test_an_ignored_scope_that_protects_nothing_is_refused(rules: dict[str, Any], kind: Any, found: Layers) -> None:
    everything = {TargetScope(types=["linear"]): 0.5}
    with pytest.raises(ScopeError, match="protects nothing: no Linear layer fits|names no Linear layer but") as caught:
        match_targets(everything, kind(**rules), found)
    assert "\n" not in str(caught.value)
    assert len(match_targets(everything, kind(**rules, validate=False), found)) == len(found.all)
    assert len(match_targets(everything, kind(), found)) == len(found.all)


class _Pairs(dict[Any, float]):
    """A dict as far as its pairs go."""

    def __init__(self, pairs: list[tuple[Any, float]]) -> None:
        super().__init__()
        self.pairs = pairs

    def items(self) -> Any:
        return self.pairs


# ---- Before a model is seen


@pytest.mark.parametrize("target", [0, 1, 0.0, 1.0, 0.5, np.float32(0.5), np.float64(0.25), np.int64(1)], ids=repr)
def test_numbers_from_0_to_1_are_targets(target: Any) -> None:
    validate_targets(target, None)
    validate_targets({TargetScope(names=["x"]): target}, nncf.IgnoredScope())


@pytest.mark.parametrize("target", [-0.1, 1.1, math.nan, math.inf, "0.5", True, None, 0.5j, [0.5]], ids=repr)
def test_anything_else_is_refused_with_the_scope_that_it_is_for(target: Any) -> None:
    with pytest.raises(ScopeError, match=r"target sparsity should be a number in range \[0, 1\], not"):
        validate_targets(target, None)
    with pytest.raises(ScopeError, match=r"target sparsity for TargetScope\(names=\['x'\]\) should be"):
        validate_targets({TargetScope(names=["x"]): target}, None)


@pytest.mark.parametrize("scope", ["mlp", ".*", 0, None, ("ffn.up",)], ids=repr)
def test_only_scopes_are_scopes(scope: Any) -> None:
    with pytest.raises(ScopeError, match=r"a key of target_sparsity_by_scope must be a TargetScope or one of NNCF's"):
        validate_targets({scope: 0.5}, None)
    if scope is not None:
        with pytest.raises(ScopeError, match="ignored_scope must be a TargetScope or one of NNCF's scopes, not"):
            validate_targets(0.5, scope)


def test_no_scopes_at_all_are_refused() -> None:
    with pytest.raises(ScopeError, match="target_sparsity_by_scope is empty"):
        validate_targets({}, None)

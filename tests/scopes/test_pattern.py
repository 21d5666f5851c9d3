"""Patterns match what `re.match` matches, and never take longer than their limit."""

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.errors import ScopeError
from actsparse.scopes import pattern as module
from actsparse.scopes.pattern import compile_pattern, match_names

NAMES = [f"model.layers.{i}.{layer}" for i in (0, 1, 10) for layer in ("mlp.up_proj", "self_attn.q_proj")]
NAMES += ["model/mlp/up_proj/linear/0", "lm_head", "lm_head/linear/0", "", "é{1}", "[:a]"]

_PARTS = st.sampled_from(
    [
        "model",
        "layers",
        "mlp",
        "up",
        "_proj",
        r"\.",
        ".",
        "/",
        r"\d",
        r"\w",
        "0",
        "1",
        "[a-m]",
        "[^.]",
        "[[:a]",
        "é",
        "^",
    ]
    + ["$", r"\Z", r"\b", "{", "}", "{1}", "x{e<=1}", r"\A", "(?=.*up)", "(?!.*attn)", "(?i:MODEL)", "[a--b]"]
)
_PATTERNS = st.recursive(
    _PARTS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(st.lists(inner, min_size=1, max_size=3), st.sampled_from(["({})", "(?:{})", "(?P<n>{})"])).map(
            lambda pair: pair[1].format("|".join(pair[0]))
        ),
        st.tuples(inner, st.sampled_from([".*", "*", "+", "?", "{1,2}", "{,3}", "*?", "*+"])).map("".join),
    ),
    max_leaves=6,
)


@settings(max_examples=150)
@given(_PATTERNS)
def test_names_match_as_by_re(pattern: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {name for name in NAMES if re.compile(pattern).match(name)}
    except re.error:
        with pytest.raises(ScopeError, match="is not a regular expression"):
            match_names(pattern, NAMES)
    else:
        assert match_names(pattern, NAMES) == expected


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(.*)*!", "(?:a?){40}a{40}!", ".*.*.*.*.*.*.*.*.*.*!", "(a|b|ab)*c"]
)
def test_a_pattern_that_takes_too_long_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setattr(module, "TIME_LIMIT_S", 0.5)
    started = time.monotonic()
    with pytest.raises(ScopeError, match="takes too long to match") as caught:
        match_names(pattern, ["ab" * 50, "a" * 200 + "?"])
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)


def test_a_repeated_group_that_takes_no_time_is_matched() -> None:
    assert match_names(r"(model|lm)(\.\w+)*$", NAMES) == {name for name in NAMES[:6]}
    assert match_names("((a{1000}){1000}){1000}", NAMES) == set()


def test_an_ordinary_pattern_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert match_names(r".*(up|gate)_proj.*", NAMES) == {name for name in NAMES if "up_proj" in name}


@pytest.mark.parametrize("pattern", ["a" * 5001, "(" * 6000], ids=["long", "long and wrong"])
def test_a_long_pattern_is_refused_in_a_short_line(pattern: str) -> None:
    with pytest.raises(ScopeError, match="give names instead") as caught:
        compile_pattern(pattern)
    assert len(str(caught.value)) < 200


def test_a_deep_pattern_is_refused() -> None:
    with pytest.raises(ScopeError, match="is not a regular expression"):
        compile_pattern("(" * 2400 + "a" + ")" * 2400)

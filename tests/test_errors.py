"""One family of errors, and the nearest names in them."""

import nncf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse import errors
from actsparse.errors import ActsparseError, ScopeError, nearest

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_can_be_caught_as_one(kind: type[Exception]) -> None:
    assert issubclass(kind, ActsparseError)
    assert issubclass(kind, ValueError)


def test_code_that_expects_nncfs_error_catches_ours() -> None:
    assert issubclass(ScopeError, nncf.ValidationError)


def test_the_most_similar_names_come_first() -> None:
    assert nearest("ffn.upp", ["attention.out", "ffn.gate", "ffn.up"]).startswith("ffn.up")


def test_names_that_are_not_alike_at_all_still_say_what_there_is() -> None:
    assert nearest("zzz", ["a", "b", "c", "d"]) == "a, b, c"
    assert nearest("zzz", []) == "none"


@given(name=st.text(), candidates=st.lists(st.text(min_size=1), max_size=8), limit=st.integers(1, 4))
def test_what_is_listed_exists_and_is_listed_once(name: str, candidates: list[str], limit: int) -> None:
    pool = [candidate.replace(",", "") or "x" for candidate in candidates]
    listed = nearest(name, pool, limit).split(", ")
    assert len(set(listed)) == len(listed) <= limit
    assert set(listed) <= set(pool or ["none"])

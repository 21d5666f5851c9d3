"""A text knows what it holds."""

from actsparse.texts import Text


def test_the_hash_depends_on_the_pages_only() -> None:
    assert Text("one", ("a", "b")).sha256 == Text("other", ("a", "b"), is_wikitext=True).sha256
    hashes = {Text("one", pages).sha256 for pages in [("a", "b"), ("ab",), ("b", "a"), ("a",)]}
    assert len(hashes) == 4

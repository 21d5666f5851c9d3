"""Predictions are split into pieces of few tokens, and nothing is lost."""

import pytest
import torch

from actsparse.torch.logits import split_tokens


@pytest.mark.parametrize(("tokens", "words"), [(1, 7), (5, 300_000), (40, 100_000), (0, 9), (3, 1 << 21)])
def test_pieces_are_the_whole_in_order(tokens: int, words: int) -> None:
    logits, labels = torch.arange(tokens)[:, None].expand(tokens, words), torch.arange(tokens)
    pieces = list(split_tokens(logits, labels))
    assert torch.cat([rows[:, 0] for rows, _ in pieces]).equal(labels)
    assert torch.cat([row_labels for _, row_labels in pieces]).equal(labels)
    assert all(len(rows) == len(row_labels) and rows.shape[1] == words for rows, row_labels in pieces)


def test_pieces_are_small_but_never_empty() -> None:
    sizes = [len(rows) for (rows,) in split_tokens(torch.zeros(1, 1).expand(50, 262_144))]
    assert max(sizes) == 4
    assert {len(rows) for (rows,) in split_tokens(torch.zeros(1, 1).expand(3, 1 << 22))} == {1}

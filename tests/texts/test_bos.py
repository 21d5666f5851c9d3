"""A dataset without the token that the tokenizer begins texts with is told, once."""

import logging
from typing import Any

import pytest
import torch

from actsparse import sparsify_activations
from actsparse.texts.bos import leading_tokens, warn_of_missing_bos

BOS, PAD = 7, 0


class Tokenizer:
    """A tokenizer that begins texts with BOS, or not."""

    bos_token_id = BOS

    def __init__(self, begins_with_bos: bool = True) -> None:
        self._start = [BOS] if begins_with_bos else []

    def encode(self, text: str) -> list[int]:
        return [*self._start, len(text) + 10]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_what_texts_begin_with() -> None:
    assert leading_tokens(Tokenizer()) == [BOS]
    assert leading_tokens(Tokenizer(begins_with_bos=False)) == []


@pytest.mark.parametrize(
    ("rows", "mask", "missing"),
    [
        ([[BOS, 1, 2], [BOS, 3, 4]], None, 0),
        ([[BOS, 1, 2], [5, 3, 4]], None, 1),
        ([[1, 2, 3], [5, 3, 4]], None, 2),
        ([[PAD, BOS, 2], [BOS, 3, 4]], [[0, 1, 1], [1, 1, 1]], 0),
        ([[PAD, PAD, 2], [BOS, 3, 4]], [[0, 0, 1], [1, 1, 1]], 1),
    ],
)
def test_sequences_without_it_are_counted(rows: Any, mask: Any, missing: int, caplog: pytest.LogCaptureFixture) -> None:
    batch = {"input_ids": torch.tensor(rows)} | ({"attention_mask": torch.tensor(mask)} if mask else {})
    warn_of_missing_bos(Tokenizer(), batch)
    assert len(warnings(caplog)) == bool(missing)
    assert all(line.startswith(f"{missing} of the 2 sequences") for line in warnings(caplog))
    caplog.clear()
    warn_of_missing_bos(Tokenizer(begins_with_bos=False), batch)
    assert not warnings(caplog)


@pytest.mark.parametrize("batch", [torch.zeros(1, 3), ("a",), {"pixels": 1}, {"input_ids": [1, 2]}, None])
def test_what_is_no_batch_of_tokens_says_nothing(batch: Any, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_missing_bos(Tokenizer(), batch)
    assert not warnings(caplog)


def test_the_call_warns_once_and_reads_a_stream_once(
    llama: Any, make_batches: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = make_batches(3)
    sparsify_activations(llama, iter(batches), 0.5, tokenizer=Tokenizer())
    assert len(warnings(caplog)) == 1
    caplog.clear()
    for batch in batches:
        batch["input_ids"][:, 0] = BOS
    sparsify_activations(llama, batches, 0.5, tokenizer=Tokenizer())
    sparsify_activations(llama, batches, 0.5)
    assert not warnings(caplog)

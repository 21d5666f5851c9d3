"""Calibration batches: consecutive windows of tokens."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from actsparse.errors import DatasetError
from actsparse.texts import Text, take_batches, token_batches


def make_tokenizer(num_words: int = 100, *, adds_bos: bool = False) -> Any:
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "a-b": 4} | {f"w{i}": 5 + i for i in range(num_words)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_batches_are_consecutive_windows_over_all_pages() -> None:
    tokenizer = make_tokenizer()
    text = Text("words", tuple(f"w{3 * i} w{3 * i + 1} w{3 * i + 2}" for i in range(10)))
    batches = token_batches(tokenizer, text, num_batches=3, length=4, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4)] * 3
    assert torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist() == list(range(5, 29))
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer, text = make_tokenizer(adds_bos=True), Text("words", ("w0 w1 w2 w3 w4",))
    batches = token_batches(tokenizer, text, num_batches=2, length=3)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[0, 5, 6]], [[0, 7, 8]]]


def test_only_wikitext_is_detokenised() -> None:
    tokenizer = make_tokenizer()
    wikitext = token_batches(tokenizer, Text("t", ("a @-@ b",), is_wikitext=True), num_batches=1, length=1)
    assert wikitext[0]["input_ids"].tolist() == [[4]]
    plain = token_batches(tokenizer, Text("t", ("a @-@ b",)), num_batches=1, length=3)
    assert plain[0]["input_ids"].tolist() == [[3, 2, 2]]


def test_a_text_that_is_too_short_is_refused_with_how_many_batches_it_gives() -> None:
    text = Text("short.txt", ("w0 w1 w2 w3 w4 w5 w6",))
    with pytest.raises(DatasetError, match=r"short\.txt is too short: its 7 tokens make 3 batches of 1 x 2 .*not 4"):
        token_batches(make_tokenizer(), text, num_batches=4, length=2)


@pytest.mark.parametrize("name", ["num_batches", "length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_of_batches_that_are_not_positive_are_refused(name: str, value: Any) -> None:
    numbers: dict[str, Any] = {"num_batches": 1, "length": 1, "batch_size": 1} | {name: value}
    with pytest.raises(DatasetError, match=f"{name} is {value}"):
        token_batches(make_tokenizer(), Text("t", ("w0 w1",)), **numbers)


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(DatasetError, match="no room"):
        token_batches(make_tokenizer(adds_bos=True), Text("t", ("w0",)), num_batches=1, length=1)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_as_many_windows_are_taken_as_the_text_makes(adds_bos: bool) -> None:
    tokenizer, text = make_tokenizer(adds_bos=adds_bos), Text("words", ("w0 w1 w2 w3 w4 w5 w6",))
    assert len(take_batches(tokenizer, text, most=2, length=3)) == 2
    assert len(take_batches(tokenizer, text, most=9, length=3)) == (3 if adds_bos else 2)
    assert take_batches(tokenizer, text, most=9, length=9) == []

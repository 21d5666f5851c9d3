"""A masked model beside itself: the same figures as each way of measuring them alone."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actsparse import measure_sparsity, sparsify_activations, word_perplexity
from actsparse.errors import ActsparseError
from actsparse.evaluation import comparison, windows
from actsparse.evaluation.comparison import compare_losses, compare_with_dense
from actsparse.sparsify import remove_sparsifiers
from actsparse.texts import token_batches


def test_its_perplexities_are_those_of_word_perplexity(small_language_model: Any) -> None:
    model, tokenizer, pages, batches = small_language_model
    sparsify_activations(model, batches, 0.6)
    figures = compare_with_dense(model, tokenizer, pages, max_length=32).to_dict()
    sparse = word_perplexity(model, tokenizer, pages, max_length=32)
    dense = word_perplexity(remove_sparsifiers(model), tokenizer, pages, max_length=32)
    assert figures["word_perplexity"] == pytest.approx(sparse.word_perplexity, rel=1e-5)
    assert figures["token_perplexity"] == pytest.approx(sparse.token_perplexity, rel=1e-5)
    assert figures["dense_word_perplexity"] == pytest.approx(dense.word_perplexity, rel=1e-5)
    ratio = sparse.token_perplexity / dense.token_perplexity
    assert figures["loss_increase"] == pytest.approx(math.log(ratio), abs=1e-5)
    assert sum(figures["window_tokens"]) == sparse.num_tokens
    assert json.loads(json.dumps(figures)) == figures


def test_masks_of_nothing_change_nothing(small_language_model: Any) -> None:
    model, tokenizer, pages, batches = small_language_model
    sparsify_activations(model, batches, 0)
    found = compare_with_dense(model, tokenizer, pages, max_length=32).to_dict()
    assert found["kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert found["top1_agreement"] == 1
    assert found["loss_increase"] == found["loss_increase_interval"][0] == found["loss_increase_interval"][1] == 0
    assert found["measured_sparsity"] == 0


def test_more_sparsity_diverges_more_and_is_counted_without_the_dense_runs(small_language_model: Any) -> None:
    model, tokenizer, pages, batches = small_language_model
    found = []
    for target in (0.2, 0.5, 0.8):
        sparsify_activations(model, batches, target)
        found.append(compare_with_dense(model, tokenizer, pages, max_length=32))
        windows = token_batches(tokenizer, load_pages_of(pages), num_batches=1, length=32)
        assert found[-1].sparsity.sparsity == pytest.approx(measure_sparsity(model, windows).sparsity, abs=0.05)
    divergences = [comparison.divergence.sum() for comparison in found]
    assert divergences == sorted(divergences)
    assert (found[0].dense == found[2].dense).all()


def load_pages_of(pages: tuple[str, ...]) -> Any:
    from actsparse.texts import Text

    return Text("pages", pages)


def test_losses_alone_are_the_same_and_the_dense_ones_are_taken_over(
    small_language_model: Any,
) -> None:
    model, tokenizer, pages, batches = small_language_model
    sparsify_activations(model, batches, 0.5)
    whole = compare_with_dense(model, tokenizer, pages, max_length=32)
    first = compare_losses(model, tokenizer, pages, max_length=32)
    for name in ("tokens", "dense", "sparse"):
        assert getattr(first, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert first.sparsity == whole.sparsity
    again = compare_losses(model, tokenizer, pages, max_length=32, dense=first.dense + 1)
    assert again.dense == pytest.approx(first.dense + 1)
    assert again.sparse == pytest.approx(first.sparse)


def test_a_perplexity_too_large_for_a_float_is_infinite(small_language_model: Any) -> None:
    model, tokenizer, pages, batches = small_language_model
    sparsify_activations(model, batches, 0.5)
    found = compare_with_dense(model, tokenizer, pages, max_length=32)
    figures = replace(found, sparse=found.sparse + 1000.0, num_words=1).to_dict()
    assert figures["word_perplexity"] == math.inf
    assert math.isfinite(figures["loss_increase"])


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "logits contain NaN on page 2 of 2, 'in to"), (-math.inf, "rules out a token of page 2 of 2")],
    ids=["NaN", "infinity"],
)
@pytest.mark.parametrize("compare", [compare_with_dense, compare_losses])
@pytest.mark.parametrize("side", [0, 1], ids=["sparse", "dense"])
def test_losses_that_cannot_be_compared_name_the_page(
    small_language_model: Any, monkeypatch: pytest.MonkeyPatch, compare: Any, value: float, message: str, side: int
) -> None:
    model, tokenizer, (page,), batches = small_language_model
    sparsify_activations(model, batches, 0.5)
    real, calls = comparison.score_window, iter(range(1000))

    def overflow(*args: Any) -> Any:
        logits, targets = real(*args)
        number = next(calls)
        if number // 2 == 1 and number % 2 == side:
            logits[0, targets[0]] = value
        return logits, targets

    for module in (comparison, windows):
        monkeypatch.setattr(module, "score_window", overflow)
    # The first page is one window, which is run twice.
    with pytest.raises(ActsparseError, match=message):
        compare(model, tokenizer, [" ".join(page.split()[:10]), "in to " + page], max_length=32)


def test_a_dense_loss_taken_over_has_to_be_one(small_language_model: Any) -> None:
    model, tokenizer, pages, batches = small_language_model
    sparsify_activations(model, batches, 0.5)
    dense = compare_losses(model, tokenizer, pages, max_length=32).dense
    with pytest.raises(ActsparseError, match="logits contain NaN on page 1 of 1"):
        compare_losses(model, tokenizer, pages, max_length=32, dense=dense * np.nan)

"""A masked model beside itself: the same figures as each way of measuring them alone."""

import json
import math
from typing import Any

import pytest

from actsparse import measure_sparsity, sparsify_activations, word_perplexity
from actsparse.evaluation.comparison import compare_losses, compare_with_dense
from actsparse.insertion import remove_sparsifiers
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

"""Running OpenVINO models: each batch by itself, in full precision; word perplexity is that of torch."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from optimum.intel import OVModelForCausalLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from actsparse import ActsparseError, measure_sparsity, sparsify_activations, word_perplexity
from actsparse.errors import SourceError
from actsparse.evaluation.cost import evaluate_cost
from actsparse.openvino.runner import Runner

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model

WORDS = [f"word{i}" for i in range(62)]
PAGES = [" ".join(WORDS[(7 * i * (page + 1)) % 62] for i in range(1, 90)) for page in range(3)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<s>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def test_every_batch_is_a_new_sequence(openvino_llama: ov.Model, batches: list[Any]) -> None:
    runner = Runner(openvino_llama)
    first = runner.run(batches[0])["logits"].copy()
    runner.run({"input_ids": batches[1]["input_ids"][:1, :5]})
    assert np.array_equal(runner.run(batches[0])["logits"], first)


def test_outputs_are_those_of_torch(make_model: Any, openvino_llama: ov.Model, batches: list[Any]) -> None:
    with torch.no_grad():
        expected = make_model()(**batches[0]).logits
    np.testing.assert_allclose(Runner(openvino_llama).run(batches[0])["logits"], expected, atol=1e-4)


@pytest.mark.parametrize("target", [0.0, 0.5], ids=["dense", "sparse"])
def test_word_perplexity_and_cost_are_those_of_the_torch_model(
    target: float, make_model: Any, export_folder: Any, batches: list[Any], tokenizer: Any
) -> None:
    folder: Path = export_folder("llama")
    models = (
        make_model(),
        ov.Core().read_model(folder / "openvino_model.xml"),
        OVModelForCausalLM.from_pretrained(folder),
    )
    for model in models:
        sparsify_activations(model, batches, target)
    expected, *found = (word_perplexity(model, tokenizer, PAGES, max_length=32, progress=False) for model in models)
    for perplexity in found:
        assert perplexity.word_perplexity == pytest.approx(expected.word_perplexity, rel=1e-4)
        assert (perplexity.num_tokens, perplexity.max_length) == (expected.num_tokens, expected.max_length)
    costs = [evaluate_cost(model, tokenizer, PAGES, max_length=32) for model in models]
    assert [cost.perplexity.word_perplexity for cost in costs[1:]] == pytest.approx(
        [expected.word_perplexity] * 2, rel=1e-4
    )
    if target:
        sparsity = [cost.sparsity.sparsity for cost in costs if cost.sparsity]
        assert sparsity[1:] == pytest.approx([sparsity[0]] * 2, abs=1e-3)
    else:
        assert costs[1].sparsity is None


def test_a_window_of_the_models_own_limit_is_taken_from_optimums_configuration(
    export_folder: Any, tokenizer: Any
) -> None:
    model: Any = OVModelForCausalLM.from_pretrained(export_folder("llama"), compile=False)
    assert word_perplexity(model, tokenizer, PAGES, progress=False).max_length == 64
    with pytest.raises(ActsparseError, match="at most 64"):
        word_perplexity(model, tokenizer, PAGES, max_length=65, progress=False)
    assert model.request is None


def test_a_model_that_gives_no_logits_has_no_perplexity(tokenizer: Any) -> None:
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    model = make_graph([ops.result(ids), ops.result(ops.convert(ids, "f32"))], [ids], "no logits")
    with pytest.raises(ActsparseError, match=r"returns \.logits"):
        word_perplexity(model, tokenizer, PAGES, max_length=32, progress=False)


def test_tokens_that_the_model_does_not_know_are_refused(openvino_llama: ov.Model) -> None:
    vocabulary = {word: i for i, word in enumerate(["<s>", *(f"word{i}" for i in range(90))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    larger = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    with pytest.raises(SourceError, match="the model knows 64"):
        word_perplexity(openvino_llama, larger, ["word80 word1"], max_length=32, progress=False)


def test_optimums_models_are_measured_too(export_folder: Any, batches: list[Any]) -> None:
    model = sparsify_activations(OVModelForCausalLM.from_pretrained(export_folder("llama")), batches, 0.5)
    assert measure_sparsity(model, batches).sparsity == pytest.approx(0.5, abs=0.02)

"""Word perplexity, held against lm-evaluation-harness itself."""

import copy
import math
import random
from types import SimpleNamespace
from typing import Any

import nncf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actsparse.errors import ActsparseError, SourceError
from actsparse.evaluation.windows import rolling_windows
from actsparse.evaluation.word_perplexity import WordPerplexity, word_perplexity

VOCABULARY = 320
LIMIT = 512
TEXT = 'the film , was @-@ in 1 @,@ 000 series ( a role ) " actor " \'s . ; 2004 = = N °'


def make_page(number: int, num_words: int) -> str:
    generator = random.Random(number)
    words = " ".join(generator.choice(TEXT.split()) for _ in range(num_words))
    return f" = Article {number} = \n \n {words} \n"


PAGES = [make_page(0, 100), make_page(1, 5), make_page(2, 40), make_page(3, 330), "café 東京 , no title here"]


def make_tokenizer(*, bos: str | None = "<s>", eos: str | None = "</s>", adds_bos: bool = False) -> Any:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 10,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PAGES, trainer)
    if adds_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>")


def make_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": LIMIT}
    config = LlamaConfig.from_dict({"initializer_range": 0.2} | sizes | changes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return make_llama()


class OutputModel(nn.Module):
    """A model whose logits are made by a function of the input tokens, for tests that need to know them."""

    def __init__(self, make_logits: Any) -> None:
        super().__init__()
        self.make_logits = make_logits
        self.inner = nn.Dropout()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.make_logits(input_ids))


def uniform_logits(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*input_ids.shape, VOCABULARY)


def measure_with_harness(model: Any, tokenizer: Any, pages: list[str], max_length: int) -> dict[str, float]:
    """Run the harness's model class on the harness's own detokenised pages, and its own aggregation."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    tokenizer = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    harness_model = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
    docs = [{"page": page} for page in pages]
    requests = [Instance("loglikelihood_rolling", doc, (wikitext_detokenizer(doc),), 0) for doc in docs]
    answers = harness_model.loglikelihood_rolling(requests, disable_tqdm=True)
    results = [process_results(doc, (answer,)) for doc, answer in zip(docs, answers, strict=True)]
    return {
        "word_perplexity": weighted_perplexity([result["word_perplexity"] for result in results]),
        "byte_perplexity": weighted_perplexity([result["byte_perplexity"] for result in results]),
        "bits_per_byte": bits_per_byte([result["bits_per_byte"] for result in results]),
    }


def assert_equal_to_harness(model: Any, tokenizer: Any, max_length: int, rel: float = 1e-6) -> None:
    ours = word_perplexity(model, tokenizer, PAGES, max_length=max_length, progress=False)
    harness = measure_with_harness(model, tokenizer, PAGES, max_length)
    assert {name: getattr(ours, name) for name in harness} == pytest.approx(harness, rel=rel)


@pytest.mark.parametrize("max_length", [16, 64, 300, LIMIT])
def test_it_equals_the_harness_for_pages_longer_and_shorter_than_the_window(
    llama: LlamaForCausalLM, tokenizer: Any, max_length: int
) -> None:
    assert_equal_to_harness(llama, tokenizer, max_length)


@pytest.mark.parametrize(
    "options",
    [{"adds_bos": True}, {"bos": None}, {"eos": None}],
    ids=["tokenizer adds BOS", "only EOS", "only BOS"],
)
def test_it_equals_the_harness_whatever_special_tokens_the_tokenizer_has(
    llama: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    assert_equal_to_harness(llama, make_tokenizer(**options), max_length=64)


def test_a_page_that_brings_its_own_bos_is_tokenised_as_in_the_harness(llama: LlamaForCausalLM) -> None:
    tokenizer, pages = make_tokenizer(adds_bos=True), ["<s> the film was in 2004", "the film"]
    ours = word_perplexity(llama, tokenizer, pages, max_length=64, progress=False)
    harness = measure_with_harness(llama, tokenizer, pages, max_length=64)
    assert ours.word_perplexity == pytest.approx(harness["word_perplexity"], rel=1e-6)


def test_it_equals_the_harness_for_another_architecture(tokenizer: Any) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config.from_dict(sizes)
    assert_equal_to_harness(GPT2LMHeadModel(config).eval(), tokenizer, max_length=128)


def test_it_equals_the_harness_after_nncf_compressed_the_weights(tokenizer: Any) -> None:
    example = nncf.Dataset([{"input_ids": torch.arange(8)[None]}])
    model = nncf.compress_weights(make_llama(), mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=example)
    assert_equal_to_harness(model, tokenizer, max_length=64)


def test_a_bf16_model_is_scored_in_fp32(tokenizer: Any) -> None:
    model = make_llama().bfloat16()
    result = word_perplexity(model, tokenizer, PAGES, max_length=64, progress=False)
    # The harness takes the log-softmax in bf16, so it agrees only to bf16's 8 bits.
    harness = measure_with_harness(model, tokenizer, PAGES, max_length=64)
    assert result.bits_per_byte == pytest.approx(harness["bits_per_byte"], rel=1e-2)
    as_fp32 = OutputModel(lambda ids: model(ids).logits.float())
    assert word_perplexity(as_fp32, tokenizer, PAGES, max_length=64, progress=False) == result


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 50))
def test_windows_are_those_of_the_harness(num_tokens: int, max_length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(num_tokens + 1))
    expected = utils.get_rolling_token_windows(ids[1:], prefix_token=0, max_seq_len=max_length, context_len=1)
    windows = rolling_windows(num_tokens, max_length)
    ours = [(ids[w.start : w.end], ids[w.end - w.num_scored + 1 : w.end + 1]) for w in windows]
    assert ours == [(inputs, targets) for inputs, targets in expected]


def test_a_model_that_guesses_has_its_vocabulary_as_token_perplexity(tokenizer: Any) -> None:
    result = word_perplexity(OutputModel(uniform_logits), tokenizer, PAGES, max_length=50, progress=False)
    assert result.token_perplexity == pytest.approx(VOCABULARY)
    assert result.negative_log_likelihood == pytest.approx(result.num_tokens * math.log(VOCABULARY))
    assert result.bits_per_byte == pytest.approx(result.num_tokens * math.log2(VOCABULARY) / result.num_bytes)


def test_words_and_bytes_are_counted_on_the_original_page(tokenizer: Any) -> None:
    result = word_perplexity(OutputModel(uniform_logits), tokenizer, [" é @-@ b "], progress=False)
    # A page that starts and ends with a space has an empty word on either side.
    assert (result.num_words, result.num_bytes, result.num_pages) == (5, 10, 1)


def test_the_result_is_over_all_pages_and_not_a_mean_of_pages(llama: LlamaForCausalLM, tokenizer: Any) -> None:
    whole = word_perplexity(llama, tokenizer, iter(PAGES), max_length=64, progress=False)
    parts = [word_perplexity(llama, tokenizer, [page], max_length=64, progress=False) for page in PAGES]
    loss, words = sum(part.negative_log_likelihood for part in parts), sum(part.num_words for part in parts)
    assert whole.word_perplexity == pytest.approx(math.exp(loss / words))


def test_no_more_than_a_piece_of_fp32_log_probabilities_exists_at_a_time(
    llama: LlamaForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    cross_entropy = nn.functional.cross_entropy

    def count_rows(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(logits))
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "cross_entropy", count_rows)
    monkeypatch.setattr("actsparse.torch.logits._PIECE", 8 * llama.config.vocab_size + 1)
    result = word_perplexity(llama, tokenizer, PAGES, max_length=LIMIT, progress=False)
    assert max(rows) == 8
    assert sum(rows) == result.num_tokens


def test_the_default_window_is_the_models_own_limit_or_2048(llama: LlamaForCausalLM, tokenizer: Any) -> None:
    assert word_perplexity(llama, tokenizer, PAGES[1:2], progress=False).max_length == LIMIT
    assert word_perplexity(OutputModel(uniform_logits), tokenizer, PAGES[1:2], progress=False).max_length == 2048
    longer = make_llama(max_position_embeddings=4096)
    assert word_perplexity(longer, tokenizer, PAGES[1:2], progress=False).max_length == 2048


def test_every_submodule_gets_its_mode_back_even_after_an_error(tokenizer: Any) -> None:
    modes: list[bool] = []

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        modes.append(model.inner.training)
        return uniform_logits(input_ids)

    model = OutputModel(logits).train()
    word_perplexity(model, tokenizer, PAGES[:1], progress=False)
    assert not any(modes)
    assert (model.training, model.inner.training) == (True, True)
    model.inner.eval()
    model.make_logits = lambda input_ids: uniform_logits(input_ids) * math.nan
    with pytest.raises(ActsparseError, match="NaN"):
        word_perplexity(model, tokenizer, PAGES[:1], progress=False)
    assert (model.training, model.inner.training) == (True, False)


def test_no_gradient_is_recorded(llama: LlamaForCausalLM, tokenizer: Any) -> None:
    needed: list[bool] = []
    handle = llama.lm_head.register_forward_hook(lambda module, args, output: needed.append(output.requires_grad))
    word_perplexity(llama, tokenizer, PAGES[:1], progress=False)
    handle.remove()
    assert needed
    assert not any(needed)


def test_nothing_is_written_where_stderr_is_no_terminal(
    llama: LlamaForCausalLM, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    word_perplexity(llama, tokenizer, PAGES[:1])
    assert capsys.readouterr() == ("", "")


def test_a_model_that_rules_a_token_out_has_infinite_perplexity(tokenizer: Any) -> None:
    certain = torch.full((VOCABULARY,), -math.inf)
    certain[1] = 0.0
    model = OutputModel(lambda input_ids: certain.expand(*input_ids.shape, VOCABULARY))
    result = word_perplexity(model, tokenizer, PAGES[:1], progress=False)
    assert isinstance(result, WordPerplexity)
    assert result.word_perplexity == math.inf


def test_nan_logits_name_the_page(tokenizer: Any) -> None:
    first = torch.tensor(tokenizer.encode("café"))

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        is_last_page = torch.equal(input_ids[0, 1 : 1 + len(first)], first)
        return uniform_logits(input_ids) * (math.nan if is_last_page else 1.0)

    with pytest.raises(ActsparseError, match="page 5 of 5, 'café 東京 , no title here'"):
        word_perplexity(OutputModel(logits), tokenizer, PAGES, progress=False)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([], "no pages"),
        ([" \n"], "all 1 pages are blank"),
        ("one string", "split_pages"),
        ([b"bytes"], "page 1 is of type bytes"),
        (["a", "b \ud800"], "lone surrogate"),
    ],
    ids=["none", "blank", "one string", "bytes", "surrogate"],
)
def test_pages_that_are_no_text_are_refused(llama: LlamaForCausalLM, tokenizer: Any, pages: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        word_perplexity(llama, tokenizer, pages, progress=False)


@pytest.mark.parametrize("max_length", [0, -1, True, 2.0, "64", LIMIT + 1])
def test_a_window_that_is_not_possible_is_refused(llama: LlamaForCausalLM, tokenizer: Any, max_length: Any) -> None:
    with pytest.raises(ActsparseError, match=r"max_length is .*(at least 1|at most 512 tokens)"):
        word_perplexity(llama, tokenizer, PAGES, max_length=max_length, progress=False)


def test_a_tokenizer_without_bos_and_eos_is_refused(llama: LlamaForCausalLM) -> None:
    with pytest.raises(SourceError, match="neither a BOS nor an EOS"):
        word_perplexity(llama, make_tokenizer(bos=None, eos=None), PAGES, progress=False)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Any) -> None:
    with pytest.raises(SourceError, match="do not belong together"):
        word_perplexity(make_llama(vocab_size=100), tokenizer, PAGES, progress=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda input_ids: torch.zeros(1), "returned Tensor"),
        (OutputModel(lambda input_ids: torch.zeros(1, 2)), r"shape \[1, 2\]"),
    ],
    ids=["no logits", "logits of another shape"],
)
def test_a_model_that_is_no_causal_language_model_is_refused(tokenizer: Any, model: Any, message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        word_perplexity(model, tokenizer, PAGES, progress=False)

"""The built-in default model and its converted copy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from actsparse.errors import MemoryLimitError, SourceError
from actsparse.models import default, load_model
from actsparse.storage import assets


@dataclass
class FakeConversion:
    make_llama: Callable[[], LlamaForCausalLM]
    make_tokenizer: Callable[[], PreTrainedTokenizerFast]
    calls: int = 0

    def __call__(self, path: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        self.calls += 1
        return self.make_llama().to(dtype=dtype), self.make_tokenizer()


@pytest.fixture
def conversion(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_llama: Callable[[], LlamaForCausalLM],
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
) -> FakeConversion:
    fake = FakeConversion(make_llama, make_tokenizer)
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "fetch_model", lambda: tmp_path / "default.gguf")
    monkeypatch.setattr(default, "load_gguf", fake)
    return fake


def test_the_default_model_is_converted_once(conversion: FakeConversion, tmp_path: Path) -> None:
    first, second = load_model("default"), load_model("default")
    assert conversion.calls == 1
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["default"]


def test_a_damaged_conversion_is_made_anew(
    conversion: FakeConversion, tmp_path: Path, truncate: Callable[[Path], None]
) -> None:
    load_model("default")
    truncate(next((tmp_path / "cache").glob("*/model.safetensors")))
    load_model("default")
    load_model("default")
    assert conversion.calls == 2


def test_a_conversion_that_cannot_be_used_stays_until_there_is_another(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, truncate: Callable[[Path], None]
) -> None:
    def fail(*_: object) -> None:
        msg = "cannot load default: can't allocate memory"
        raise SourceError(msg)

    load_model("default")
    weights = next((tmp_path / "cache").glob("*/model.safetensors"))
    truncate(weights)
    before = weights.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(default, "load_gguf", fail)
        with pytest.raises(SourceError, match="allocate"):
            load_model("default")
    assert weights.read_bytes() == before
    load_model("default")
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["default"]


def test_too_little_memory_is_no_damage(conversion: FakeConversion, tmp_path: Path, caplog: Any) -> None:
    load_model("default")
    weights = next((tmp_path / "cache").glob("*/model.safetensors"))
    before = weights.stat().st_ino
    with pytest.raises(MemoryLimitError, match="so little memory"):
        load_model("default", device="auto", max_memory=1000)
    assert (conversion.calls, weights.stat().st_ino) == (1, before)
    assert not caplog.records


def test_an_interrupted_conversion_is_never_seen(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_model("default")
    assert list((tmp_path / "cache").iterdir()) == []
    load_model("default")


def test_another_process_that_converts_faster_wins(conversion: FakeConversion, tmp_path: Path) -> None:
    load_model("default")
    folder = next((tmp_path / "cache").iterdir())
    before = folder.stat().st_ino
    # The damaged one that this process found has been replaced meanwhile, if there was one.
    for damaged in (None, before + 1):
        default._keep_conversion(conversion.make_llama(), conversion.make_tokenizer(), folder, damaged)
        assert folder.stat().st_ino == before
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_two_that_convert_at_once_both_get_the_model(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not in threads, in which transformers cannot load: the second begins and ends while the first is at work.
    loaded: list[Any] = []

    def convert(path: Path, name: str, dtype: torch.dtype) -> Any:
        if conversion.calls == 0:
            conversion.calls += 1
            loaded.append(load_model("default").model.state_dict())
            conversion.calls -= 1
        return conversion(path, name, dtype)

    monkeypatch.setattr(default, "load_gguf", convert)
    first = load_model("default").model.state_dict()
    (second,) = loaded
    assert conversion.calls == 2
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_cache_that_cannot_be_written_does_not_stop_the_default_model(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "file"))
    assert load_model("default", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert "not kept" in caplog.text
    # Weights can be placed only where they lie in files.
    with pytest.raises(SourceError, match=r"--device auto needs .* cannot write to the cache folder .*ACTSPARSE_CACHE"):
        load_model("default", device="auto", max_memory=10**9)


@pytest.mark.real_model
def test_the_default_model_continues_a_text_sensibly() -> None:
    loaded = load_model("default")
    tokens = loaded.tokenizer("Hello, the capital of France is", return_tensors="pt")
    output = loaded.model.generate(**tokens, max_new_tokens=3, do_sample=False)  # pyright: ignore[reportArgumentType]
    assert str(loaded.tokenizer.decode(output[0])).startswith("Hello, the capital of France is Paris.")


@pytest.mark.real_model
def test_the_default_tokenizer_follows_its_file() -> None:
    tokenizer = load_model("default").tokenizer
    text = "In 1234,  naïve cafés\n\ncost 5.6% 🙂"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.convert_ids_to_tokens(tokens)[:7] == ["In", "Ġ", "1", "2", "3", "4", ","]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2


@pytest.mark.real_model
def test_the_default_model_is_its_gguf_file_and_saves(tmp_path: Path) -> None:
    loaded, direct = load_model("default"), load_model(str(assets.fetch_model()))
    text = "The quick brown fox jumps over 12 lazy dogs."
    tokens = loaded.tokenizer(text, return_tensors="pt")
    assert direct.tokenizer.encode(text) == loaded.tokenizer.encode(text)
    with torch.no_grad():
        expected = direct.model(**tokens).logits
        assert torch.equal(loaded.model(**tokens).logits, expected)
        direct.model.save_pretrained(tmp_path)
        direct.tokenizer.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(**tokens).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == loaded.tokenizer.encode(text)

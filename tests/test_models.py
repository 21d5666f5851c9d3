import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from actsparse import assets, models
from actsparse.errors import SourceError
from actsparse.models import load_model


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(make_llama(), tmp_path / "model")


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    loaded = load_model(str(folder))
    tokens = torch.arange(8)[None]
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer("a")["input_ids"] == [1]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, make_llama().eval()(tokens).logits)


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    assert load_model(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_loading_is_quiet_and_restores_the_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(str(folder))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_settings_are_restored_after_a_failure_too(folder: Path) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    truncate(folder / "model.safetensors")
    with pytest.raises(SourceError):
        load_model(str(folder))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_weights_without_a_place_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, lambda weights: weights.update(stranger=torch.ones(1)))
    with caplog.at_level(logging.WARNING, "actsparse"):
        load_model(str(folder))
    assert "1 weights that the model does not use, as stranger" in caplog.text


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@dataclass(frozen=True)
class Damage:
    name: str
    damage: Callable[[Path], object]
    message: str


DAMAGES = [
    Damage("no config", lambda f: (f / "config.json").unlink(), "no config.json"),
    Damage("config no JSON", lambda f: (f / "config.json").write_text("{"), "valid JSON"),
    Damage("unknown type", lambda f: change_config(f, model_type="nosuch"), "nosuch"),
    Damage("wrong kind of value", lambda f: change_config(f, hidden_size="x"), "hidden_size"),
    Damage("own code", lambda f: change_config(f, model_type="x", auto_map={"AutoConfig": "c.C"}), "custom code"),
    Damage("base model", lambda f: change_config(f, architectures=["LlamaModel"]), "no causal language model"),
    Damage("no weights", lambda f: (f / "model.safetensors").unlink(), "safetensors.* but has none"),
    Damage("pickled weights", pickle_weights, "only pickled ones"),
    Damage("truncated weights", lambda f: truncate(f / "model.safetensors"), "damaged"),
    Damage("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    Damage("missing weight", lambda f: change_weights(f, lambda w: w.pop("lm_head.weight")), "lack 1 of .* lm_head"),
    Damage("other shape", lambda f: change_config(f, intermediate_size=48), r"is \(16, 32\) but should be \(16, 48\)"),
    Damage("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    Damage("garbage tokenizer", lambda f: (f / "tokenizer.json").write_text('{"x"'), "damaged"),
]


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_an_unusable_folder_is_refused_in_one_line(folder: Path, case: Damage) -> None:
    case.damage(folder)
    with pytest.raises(SourceError, match=case.message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


OTHER_MODELS = {
    "encoder": lambda: BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    save(OTHER_MODELS[kind](), tmp_path)
    with pytest.raises(SourceError, match="no causal language model but (BertForMaskedLM|T5ForConditionalGeneration)"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["", " ", "./nosuch", "/nosuch", "~/nosuch", "~nosuchuser/x", "no/such/model", "nosuch/", "x.gguf", "a\\b"]
)
def test_a_path_where_nothing_lies_is_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_fetch_from_hub", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(SourceError, match="there is no model at"):
        load_model(name)


@pytest.mark.parametrize("name", ["bad name!", "-x", "nul\0l", "a" * 300])
def test_a_name_that_no_model_can_have_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match="it is no hub id"):
        load_model(name)


def test_a_hub_that_cannot_be_reached_is_named_with_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        msg = "name or service not known"
        raise httpx.ConnectError(msg)

    def find_nothing(*_: object, local_files_only: bool, **__: object) -> None:
        assert local_files_only
        msg = "not in the cache"
        raise LocalEntryNotFoundError(msg)

    monkeypatch.setattr(models.HfApi, "model_info", fail)
    monkeypatch.setattr(models, "snapshot_download", find_nothing)
    with pytest.raises(SourceError, match="cannot reach the model hub for 'some/model'; `default`, a local folder"):
        load_model("some/model")


def test_a_hub_model_is_downloaded_and_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(models, "snapshot_download", lambda *_, **__: str(folder))
    loaded = load_model("some/model")
    assert loaded.name == "some/model"
    assert isinstance(loaded.model, LlamaForCausalLM)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not a GGUF file"), (b"hello", "is not a GGUF file"), (b"GGUF", "damaged"), (b"GGUF" * 999, "damaged")],
    ids=["empty", "text", "header only", "garbage"],
)
def test_a_file_that_is_no_gguf_model_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_gguf_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install 'actsparse\[hub\]'"):
        load_model(str(path))


@dataclass
class FakeConversion:
    calls: int = 0

    def __call__(self, path: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        self.calls += 1
        return make_llama().to(dtype=dtype), make_tokenizer()


@pytest.fixture
def conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    fake = FakeConversion()
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "fetch_model", lambda: tmp_path / "default.gguf")
    monkeypatch.setattr(models, "_load_gguf", fake)
    return fake


def test_the_default_model_is_converted_once(conversion: FakeConversion, tmp_path: Path) -> None:
    first, second = load_model("default"), load_model("default")
    assert conversion.calls == 1
    assert first.model.state_dict().keys() == second.model.state_dict().keys()
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["default"]


def test_a_damaged_conversion_is_made_anew(conversion: FakeConversion, tmp_path: Path) -> None:
    load_model("default")
    truncate(next((tmp_path / "cache").glob("*/model.safetensors")))
    load_model("default")
    load_model("default")
    assert conversion.calls == 2


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
    models._keep_conversion(make_llama(), make_tokenizer(), folder)
    assert folder.stat().st_ino == before
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_does_not_stop_the_default_model(
    conversion: FakeConversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "file"))
    assert load_model("default", dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert "not kept" in caplog.text


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

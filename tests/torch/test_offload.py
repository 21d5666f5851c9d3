"""Models some of whose weights are loaded only while their layer runs behave like the same models in memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from actsparse import remove_sparsifiers, sparsify_activations, word_perplexity
from actsparse.commands import sparsify
from actsparse.commands.sparsify import SparsifyJob, name_calibration, run_sparsify
from actsparse.errors import ActsparseError, DatasetError, SourceError
from actsparse.models import load_model
from actsparse.openvino import export_model
from actsparse.recovery import recover
from actsparse.torch import blockwise
from actsparse.torch.blockwise import run_blockwise
from actsparse.torch.compression import compress_int8
from actsparse.torch.insertion import named_sparsifiers
from actsparse.torch.offload import every_weight, hold_weights, is_offloaded, parse_memory

from ..conftest import MIXTURES

ALGORITHMS = ("magnitude", "nncf", "auto", "fisher", "wina", "teal", "cett", "scap", "r-sparse", "measured+global")
Batches = list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def make_offloaded(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Make a tiny model all of whose blocks but the first lie on disk."""

    def make(architecture: str = "llama") -> Any:
        folder = tmp_path_factory.mktemp(architecture)
        make_model(architecture).save_pretrained(folder)
        bare = AutoModelForCausalLM.from_pretrained(folder)
        blocks = next(name for name, module in bare.named_modules() if isinstance(module, torch.nn.ModuleList))
        beside = [n for n, m in bare.named_modules() if n and not list(m.children()) and not n.startswith(f"{blocks}.")]
        numbers = range(len(bare.get_submodule(blocks)))  # type: ignore[arg-type]
        device_map = {**dict.fromkeys(beside, "cpu"), **{f"{blocks}.{i}": "disk" if i else "cpu" for i in numbers}}
        return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=folder).eval()

    return make


@pytest.fixture
def offloaded(make_offloaded: Callable[..., Any]) -> Any:
    return make_offloaded()


def thresholds(model: Any) -> dict[str, list[float]]:
    return {name: sparsifier.threshold.flatten().tolist() for name, sparsifier in named_sparsifiers(model)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_thresholds_are_those_of_the_model_in_memory(algorithm, llama, offloaded, batches):
    assert is_offloaded(offloaded)
    assert not is_offloaded(llama)
    expected = thresholds(sparsify_activations(llama, batches, 0.5, algorithm=algorithm))
    assert thresholds(sparsify_activations(offloaded, batches, 0.5, algorithm=algorithm)) == expected
    assert all(parameter.is_meta for parameter in offloaded.model.layers[1].parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "phi3", "opt"])
def test_other_architectures(architecture, make_model, make_offloaded, batches):
    expected = thresholds(sparsify_activations(make_model(architecture), batches, 0.5))
    model = sparsify_activations(make_offloaded(architecture), batches, 0.5)
    assert thresholds(model) == expected
    assert not thresholds(remove_sparsifiers(model))


def test_each_block_is_loaded_once_and_alone(offloaded, batches, monkeypatch):
    sparsify_activations(offloaded, batches, 0.5)
    loaded: list[int] = []
    blocks = offloaded.model.layers
    monkeypatch.setattr(blockwise, "hold_weights", lambda block: note(block))

    def note(block: Any) -> Any:
        loaded.append(next(i for i, each in enumerate(blocks) if each is block))
        return hold_weights(block)

    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: in_memory.append(count_loaded()))

    def count_loaded() -> int:
        return sum(not parameter.is_meta for block in blocks[1:] for parameter in block.parameters())

    in_memory: list[int] = []
    sparsify_activations(offloaded, batches, 0.5)
    # Tracing the graph runs one forward on zeros that take no memory; calibration is the last.
    assert loaded == list(range(1, len(blocks)))
    size = sum(1 for _ in blocks[1].parameters())
    assert max(in_memory[-len(batches) * len(blocks) :]) <= size
    assert count_loaded() == 0


def test_perplexity_is_that_of_the_model_in_memory(files, tmp_path):
    alone = load_model(str(files / "model"))
    largest = sum(p.numel() * 4 for p in alone.model.parameters()) // 2
    loaded = load_model(str(files / "model"), device="auto", max_memory=largest)
    assert is_offloaded(loaded.model)
    pages = [(files / "evaluation.txt").read_text(), "a page of its own"]
    expected = word_perplexity(alone.model, alone.tokenizer, pages, max_length=32)
    assert word_perplexity(loaded.model, loaded.tokenizer, pages, max_length=32) == expected


def test_a_model_that_fits_is_not_offloaded(files):
    assert not is_offloaded(load_model(str(files / "model"), device="auto").model)


def test_weights_that_are_not_in_memory_are_given_too(llama, offloaded):
    expected = sorted(weight.sum().item() for weight in llama.parameters())
    assert sorted(weight.sum().item() for weight in every_weight(llama)) == expected
    assert sorted(weight.sum().item() for weight in every_weight(offloaded)) == expected
    assert all(parameter.is_meta for parameter in offloaded.model.layers[1].parameters())


def test_a_calibration_of_other_weights_is_another_even_where_they_are_not_in_memory(llama, batches, files, tmp_path):
    def name() -> str:
        model = load_model(str(tmp_path), device="auto", max_memory=size).model
        assert is_offloaded(model)
        return name_calibration(job, model, batches)

    size = sum(p.numel() * 4 for p in llama.parameters()) // 2
    job = SparsifyJob(model=str(tmp_path), out=tmp_path / "out", sparsity=0.5)
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(tmp_path)
    llama.save_pretrained(tmp_path)
    first = name()
    assert name() == first
    # A fine-tuned model: the embeddings and all that comes first are the same.
    llama.model.layers[-1].mlp.down_proj.weight.data.mul_(1.01)
    llama.save_pretrained(tmp_path)
    assert name() != first


def test_naming_a_calibration_holds_no_weights_that_are_on_disk(make_offloaded, batches, monkeypatch, tmp_path):
    held: list[torch.Tensor] = []
    monkeypatch.setattr(sparsify, "digest_of", lambda parts: (held.extend(parts[3]), b"")[1])
    name_calibration(SparsifyJob(model="x", out=tmp_path, sparsity=0.5), make_offloaded(), batches)
    assert held
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in held)


def test_a_bad_batch_is_named_and_nothing_stays_loaded(offloaded, batches):
    hooks = [len(block._forward_pre_hooks) for block in offloaded.model.layers]
    bad = {"input_ids": torch.full((1, 4), 10**6)}
    with pytest.raises(DatasetError, match="batch 3 of the dataset"):
        sparsify_activations(offloaded, [*batches[:3], bad], 0.5)
    assert not thresholds(offloaded)
    assert all(parameter.is_meta for block in offloaded.model.layers[1:] for parameter in block.parameters())
    assert [len(block._forward_pre_hooks) for block in offloaded.model.layers] == hooks


def test_more_jobs_than_one_group(offloaded, batches, monkeypatch):
    monkeypatch.setattr(blockwise, "GROUP", 3)
    jobs = [partial(lambda batch: offloaded(**batch).logits, batch) for batch in batches * 2]
    with torch.no_grad():
        for found, batch in zip(run_blockwise(offloaded, jobs), batches * 2, strict=True):
            assert torch.equal(found, offloaded(**batch).logits)


def test_what_needs_all_weights_says_so(offloaded, batches, tmp_path, make_offloaded):
    sparsify_activations(offloaded, batches, 0.5)
    with pytest.raises(ActsparseError, match="compressing weights needs all weights in memory"):
        compress_int8(offloaded, "asym", batches[0])
    with pytest.raises(ActsparseError, match="recovery needs all weights in memory"):
        recover(offloaded, batches, steps=1)
    with pytest.raises(ActsparseError, match="the export needs all weights in memory"):
        export_model(offloaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mixture = make_offloaded(next(iter(MIXTURES)))
    with pytest.raises(ActsparseError, match="splitting experts into layers needs all weights in memory"):
        sparsify_activations(mixture, batches, 0.5)


@pytest.mark.parametrize("wanted", [{"accelerate": True}, {"recover": 1}])
def test_what_cannot_be_done_is_refused_before_calibration(files, tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(sparsify, "calibrate", pytest.fail)
    size = sum(path.stat().st_size for path in (files / "model").glob("*.safetensors"))
    texts = {"calibration": str(files / "calibration.txt"), "training": str(files / "calibration.txt")}
    placed = {"device": "auto", "max_memory": f"{size / 2e6}MB"}
    job = SparsifyJob(str(files / "model"), tmp_path, sparsity=0.5, num_batches=2, **texts, **placed, **wanted)
    with pytest.raises(ActsparseError, match=f"--{next(iter(wanted))} needs all weights in memory"):
        run_sparsify(job, lambda _: None)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_placement(files, tmp_path):
    with pytest.raises(SourceError, match="it is one of cpu, auto"):
        load_model(str(files / "model"), device="cdua")
    with pytest.raises(SourceError, match="give that too"):
        load_model(str(files / "model"), max_memory=1000)
    with pytest.raises(SourceError, match="no weights of .* fit into so little memory: its embeddings alone take 0 MB"):
        load_model(str(files / "model"), device="auto", max_memory=1000)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(SourceError, match="is for folders and hub ids"):
        load_model(str(gguf), device="auto")


@given(st.integers(1, 10**6), st.sampled_from(["KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]), st.booleans())
def test_memory_is_read(number, unit, has_space):
    power = "KMGT".index(unit[0]) + 1
    assert parse_memory(f"{number}{' ' * has_space}{unit}") == number * (1024 if "i" in unit else 1000) ** power


@pytest.mark.parametrize(("text", "size"), [("6gb", 6 * 10**9), (" 1.5 tIb ", 3 * 2**39), (".5MB", 500_000)])
def test_memory_is_read_as_people_write_it(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "6", "-1GB", "0MB", "6 XB", "nanGB", "infGB", "6GBGB", "1e30TB"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(ActsparseError, match="no amount of memory"):
        parse_memory(text)

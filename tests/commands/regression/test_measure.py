"""Measuring cases on the tiny model: the figures are those that the package's other functions give."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.figures import CaseResult
from actsparse.commands.regression.measure import measure_case, sparsity_figures
from actsparse.errors import ActsparseError, SourceError
from actsparse.evaluation.sparsity import measure_sparsity
from actsparse.evaluation.word_perplexity import word_perplexity
from actsparse.openvino import export_model
from actsparse.sparsify import sparsify_activations
from actsparse.sparsity_report import LayerSparsity, SparsityReport
from actsparse.texts import load_pages, token_batches
from actsparse.torch.compression import compress_int8

pytestmark = pytest.mark.slow

WriteCase = Callable[..., Path]


def measure(path: Path) -> CaseResult:
    return measure_case(read_case(path), lambda _: None)


def test_figures_are_those_of_the_functions_that_users_call(write_case: WriteCase, files: Path) -> None:
    result = measure(write_case("torch"))
    model = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    pages = load_pages(files / "evaluation.txt").pages
    dense = word_perplexity(model, tokenizer, pages, max_length=64)
    batches = token_batches(tokenizer, load_pages(files / "calibration.txt"), num_batches=3, length=32)
    sparsify_activations(model, batches, 0.5)
    sparse = word_perplexity(model, tokenizer, pages, max_length=64)
    figures = result.figures
    assert figures["dense_word_perplexity"].value == pytest.approx(dense.word_perplexity, rel=1e-6)
    assert figures["word_perplexity"].value == pytest.approx(sparse.word_perplexity, rel=1e-6)
    assert figures["token_perplexity"].value == pytest.approx(sparse.token_perplexity, rel=1e-6)
    assert len(result.layers) == 14
    assert figures["sparsity"].value == pytest.approx(measure_sparsity(model, batches).sparsity, abs=0.05)
    assert figures["farthest_layer"].value == pytest.approx(max(abs(share - 0.5) for share in result.layers.values()))
    assert figures["calibration_ratio"].value > 0
    assert figures["peak_memory_mb"].value > 100
    assert CaseResult.from_dict(result.to_dict(), "it") == result
    # Nothing is random.
    assert measure(write_case("torch")).windows == result.windows
    assert measure(write_case("torch", "seed: 1")).windows != result.windows


def test_nncfs_masks_are_measured_on_the_same_batches_and_windows(write_case: WriteCase) -> None:
    figures = measure(write_case("beside", "algorithm: nncf\nnncf: true")).figures
    # Our algorithm of that name is NNCF's.
    assert figures["loss_over_nncf"].value == pytest.approx(0, abs=1e-6)
    assert figures["nncf_sparsity"].value == pytest.approx(figures["sparsity"].value, abs=1e-4)
    assert figures["nncf_word_perplexity"].value == pytest.approx(figures["word_perplexity"].value, rel=1e-6)
    assert figures["nncf_calibration_ratio"].value > 0


def test_layers_can_be_left_out_on_both_sides(write_case: WriteCase) -> None:
    more = (
        "sparsity: null\ntargets: [{roles: [ffn.up, ffn.down], sparsity: 0.4}]\nignored: ['.*layers.0.*']\nnncf: true"
    )
    result = measure(write_case("some", more))
    assert sorted(result.layers) == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert result.figures["nncf_sparsity"].value == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("weights", ["int8_sym", "int4_asym"])
def test_weights_are_compressed(write_case: WriteCase, weights: str) -> None:
    result = measure(write_case("compressed", f"weights: {weights}\ngroup_size: 16"))
    assert result.figures["sparsity"].value == pytest.approx(0.5, abs=0.1)
    assert result.windows.losses["dense"] != measure(write_case("torch")).windows.losses["dense"]


def test_an_accelerated_model_costs_what_the_torch_model_does(write_case: WriteCase) -> None:
    more = "weights: int8_asym\nevaluation: {text: evaluation.txt, max_length: 128}\n"
    torch_figures = measure(write_case("torch8", more)).figures
    result = measure(write_case("openvino8", more + "backend: openvino\ndecode: true\n"))
    for name in ("dense_word_perplexity", "word_perplexity"):
        assert result.figures[name].value == pytest.approx(torch_figures[name].value, rel=0.01)
    assert result.figures["sparsity"].value == pytest.approx(torch_figures["sparsity"].value, abs=0.01)
    assert 0.1 < result.figures["decode_ratio"].value < 10
    assert sum(result.details["accelerated_layers"].values()) + result.details["kept_layers"] == 14


def test_an_openvino_folder_is_a_model_too(write_case: WriteCase, files: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    model = compress_int8(model, "sym", {"input_ids": torch.ones(1, 8, dtype=torch.long)})
    export_model(model, files / "exported", AutoTokenizer.from_pretrained(files / "model"))
    figures = measure(write_case("exported", "model: exported\nbackend: openvino")).figures
    assert figures["sparsity"].value == pytest.approx(0.5, abs=0.1)
    assert figures["word_perplexity"].value != figures["dense_word_perplexity"].value
    with pytest.raises(SourceError, match="its weights stay as they are"):
        measure(write_case("exported", "model: exported\nbackend: openvino\nweights: int8_asym"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model: ./nowhere", "there is no model at"),
        ('model: "a\\0b"', "no hub id"),
        ("model: ~nobody-of-that-name/x", "can be no path"),
        ("model: " + "x" * 300, "can be no path"),
        ('evaluation: {text: "a\\0b.txt"}', "no text source or file"),
        ("model: model\nrevision: main", "revision is for models of the hub"),
        ("evaluation: {text: evaluatoin.txt}", "evaluation.txt"),
        ("evaluation: {text: evaluation.txt, max_length: 9999}", "at most 512"),
        ("calibration: {text: calibration.txt, batches: 99}", "too short"),
        ("sparsity: null\ntargets: [{patterns: ['.*dwon.*'], sparsity: 0.5}]", "nearest"),
    ],
)
def test_what_cannot_be_measured_is_told(write_case: WriteCase, more: str, message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        measure(write_case("mistake", more))


def test_a_loss_that_is_no_number_is_told(write_case: WriteCase, files: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    model.save_pretrained(files / "broken")
    AutoTokenizer.from_pretrained(files / "model").save_pretrained(files / "broken")
    with pytest.raises(ActsparseError, match="logits contain NaN on page 1 of 1"):
        measure(write_case("broken", "model: broken"))


def test_the_farthest_layer_is_far_from_what_it_was_allocated_not_from_what_was_asked_for() -> None:
    layers = [LayerSparsity("a", "a", (), 0.5, 0.3, 0.31, 1.0), LayerSparsity("b", "b", (), 0.5, 0.7, 0.65, 1.0)]
    figures = sparsity_figures(SparsityReport((*layers, LayerSparsity("c", "c", (), None, None, 0.9, 1.0)), 3.0, "all"))
    assert figures["farthest_layer"].value == pytest.approx(0.05)

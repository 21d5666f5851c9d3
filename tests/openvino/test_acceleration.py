import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest

from actsparse import ActsparseError, sparsify_activations
from actsparse.openvino import accelerate, count_masks, extension_path
from actsparse.openvino.graph_masks import insert_mask
from actsparse.openvino.linear import find_linears
from actsparse.openvino.runner import EXACT, Runner
from actsparse.openvino.toolchain import BuildError

pytestmark = pytest.mark.slow

DEFAULT = {**EXACT, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"}


def make_core() -> ov.Core:
    core = ov.Core()
    core.add_extension(str(extension_path()))
    return core


def operations(model: ov.Model) -> list[str]:
    return sorted(node.get_type_name() for node in model.get_ops() if node.get_type_name().startswith("Sparse"))


def inputs(tokens: np.ndarray, past: int = 0) -> dict[str, np.ndarray]:
    batch, length = tokens.shape
    return {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.broadcast_to(np.arange(past, past + length), (batch, length)).copy(),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }


def logits(model: ov.Model, tokens: np.ndarray, config: dict[str, Any] = EXACT, prompt: int = 5) -> np.ndarray:
    """Run a prompt, then single tokens; return all logits [batch, tokens, vocabulary]."""
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    steps = [tokens[:, :prompt], *(tokens[:, i : i + 1] for i in range(prompt, tokens.shape[1]))]
    results, past = [], 0
    for step in steps:
        known = {port.get_any_name() for port in model.inputs}
        request.infer({name: value for name, value in inputs(step, past).items() if name in known})
        results.append(request.get_output_tensor(0).data.copy())
        past += step.shape[1]
    return np.concatenate(results, axis=1)


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """Return the error of a typical token: a rounding may turn the mask of a rare one."""
    errors = np.linalg.norm(value - reference, axis=-1) / np.linalg.norm(reference, axis=-1)
    return float(np.median(errors))


def save_accelerated(model: ov.Model, folder: Path) -> Path:
    accelerate(model)
    path = folder / "model.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def make_model_of(results: Any, x: Any) -> Any:
    # Its stubs confuse two classes of that name.
    make: Any = ov.Model
    return make(results, [x])


def make_site(mode: nncf.CompressWeightsMode, group_size: int, threshold: float) -> ov.Model:
    """Make a model of two Linear layers that read one masked input of 512 channels."""
    rng = np.random.default_rng(0)
    x = ov.opset13.parameter([1, -1, 512], np.float32)
    weights = [rng.normal(size=(out, 512)).astype(np.float32) for out in (300, 72)]
    layers = [ov.opset13.matmul(x, ov.opset13.constant(weight), False, True) for weight in weights]
    model = make_model_of([ov.opset13.result(layer) for layer in layers], x)
    settings = {"group_size": group_size, "all_layers": True} if group_size else {}
    model = nncf.compress_weights(model, mode=mode, **settings)
    insert_mask(list(find_linears(model)), threshold)
    return model


def run_site(model: ov.Model, x: np.ndarray, config: dict[str, Any] = EXACT) -> np.ndarray:
    results = ov.Core().compile_model(model, "CPU", config)([x])
    return np.concatenate([results[i] for i in range(2)], axis=-1)


@pytest.fixture(scope="session")
def make_sparse(
    make_openvino_model: Callable[..., ov.Model], make_batches: Callable[..., Any], tmp_path_factory: Any
) -> Callable[..., ov.Model]:
    """Make masked models; each one is calibrated once and read anew for every test."""
    folder = tmp_path_factory.mktemp("masked")

    def make(architecture: str = "llama", mode: str | None = "INT8_ASYM", **settings: Any) -> ov.Model:
        settings = {"target_sparsity_by_scope": 0.5, **settings}
        path = folder / f"{architecture}-{mode}-{abs(hash(str(settings)))}.xml"
        if not path.exists():
            model = make_openvino_model(architecture, mode)
            sparsify_activations(model, make_batches(), **settings)
            # Weights that are not compressed become f16 here.
            ov.save_model(model, path, compress_to_fp16=mode is None)
        return ov.Core().read_model(path)

    return make


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (1, 12))


@pytest.mark.parametrize("mode", [None, "INT8_ASYM", "INT8_SYM", "INT4_ASYM", "INT4_SYM"])
def test_exact_mode_equals_the_portable_graph(
    make_sparse: Callable[..., ov.Model], tokens: np.ndarray, mode: str | None
) -> None:
    model = make_sparse(mode=mode)
    portable = logits(model, tokens)
    accelerate(model, exact=True)
    assert operations(model) == ["SparseFeedForward"] * 2 + ["SparseHead"] * (mode is not None) + ["SparseLinear"] * 4
    assert count_masks(model) == 0
    assert relative_error(logits(model, tokens), portable) < 1e-4


@pytest.mark.parametrize("length", [1, 6, 70])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize(
    ("mode", "group_size"),
    [("INT8_ASYM", 0), ("INT8_SYM", 0), ("INT4_ASYM", 128), ("INT4_SYM", 64), ("INT4_ASYM", 32), ("INT4_ASYM", 4)],
)
def test_an_operation_is_no_further_from_f32_than_openvinos_own(
    mode: str, group_size: int, threshold: float, length: int
) -> None:
    x = np.random.default_rng(1).normal(size=(1, length, 512)).astype(np.float32)
    model = make_site(nncf.CompressWeightsMode[mode], group_size, threshold)
    reference = run_site(model, x)
    theirs = relative_error(run_site(model, x, DEFAULT), reference)
    ours = []
    for exact in (False, True):
        model = make_site(nncf.CompressWeightsMode[mode], group_size, threshold)
        assert not accelerate(model, exact=exact).kept
        ours.append(relative_error(run_site(model, x), reference))
    # Where OpenVINO does not quantise activations, its error is 0.
    assert ours[0] < max(1.1 * theirs, 0.008)
    assert ours[1] < 1e-6


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"])
def test_every_architecture_keeps_its_outputs(
    make_sparse: Callable[..., ov.Model], tokens: np.ndarray, architecture: str
) -> None:
    model = make_sparse(architecture)
    portable = logits(model, tokens)
    report = accelerate(model, exact=True)
    assert report.accelerated
    assert not report.kept
    assert relative_error(logits(model, tokens), portable) < 1e-4


def test_batches_share_one_reading_of_the_weights_and_keep_their_outputs(make_sparse: Callable[..., ov.Model]) -> None:
    tokens = np.random.default_rng(1).integers(0, 64, (3, 30))
    model = make_sparse()
    portable = logits(model, tokens, prompt=25)
    accelerate(model, exact=True)
    assert relative_error(logits(model, tokens, prompt=25), portable) < 1e-4


def test_masks_of_single_tokens_let_prompts_pass(make_sparse: Callable[..., ov.Model], tokens: np.ndarray) -> None:
    model = make_sparse(tokens="decode")
    portable = logits(model, tokens)
    assert not np.allclose(portable, logits(make_sparse(), tokens), atol=1e-3)
    accelerate(model, exact=True)
    assert relative_error(logits(model, tokens), portable) < 1e-4


def test_a_saved_model_needs_the_extension_and_nothing_else(
    make_sparse: Callable[..., ov.Model], tokens: np.ndarray, tmp_path: Path
) -> None:
    model = make_sparse()
    path = save_accelerated(model, tmp_path)
    expected = logits(model, tokens)
    with pytest.raises(RuntimeError, match="Sparse"):
        ov.Core().read_model(path)
    loaded = make_core().read_model(path)
    np.testing.assert_array_equal(logits(loaded, tokens), expected)


def test_a_model_saved_before_layouts_had_a_number_runs(
    make_sparse: Callable[..., ov.Model], tokens: np.ndarray, tmp_path: Path
) -> None:
    model = make_sparse()
    path = save_accelerated(model, tmp_path)
    expected = logits(model, tokens)
    xml, count = re.subn(r' (\w+_)?layout="1"', "", path.read_text())
    assert count >= len(operations(model))
    path.write_text(xml)
    np.testing.assert_array_equal(logits(make_core().read_model(path), tokens), expected)


def test_an_unknown_layout_is_named(make_sparse: Callable[..., ov.Model], tmp_path: Path) -> None:
    path = save_accelerated(make_sparse(), tmp_path)
    xml = path.read_text().replace('layout="1"', 'layout="7"')
    path.write_text(xml)
    with pytest.raises(RuntimeError, match=r"layout of the weights is 7.*knows only 1"):
        make_core().read_model(path)


def test_damaged_operations_are_refused_when_they_are_read(
    make_sparse: Callable[..., ov.Model], tmp_path: Path
) -> None:
    path = save_accelerated(make_sparse(), tmp_path)
    xml = path.read_text()
    for pattern, damage in [
        (r'weight_type="u8"', 'weight_type="u4"'),
        (r'weight_type="u8"', 'weight_type="u2"'),
        (r'out_features="\d+', 'out_features="4096'),
        (r'in_features="\d+', 'in_features="-1'),
        (r'in_features="\d+', 'in_features="9223372036854775807'),
        (r'activation="silu"', 'activation="tan"'),
        (r'layout="1"', 'layout="2"'),
        (r'layout="2"', 'layout="1"'),
        (r'(type="SparseHead".*?in_features=)"\d+', r'\1"16'),
        (r'(type="SparseHead".*?weight_type=)"u8"', r'\1"f16"'),
    ]:
        damaged, count = re.subn(pattern, damage, xml, count=1, flags=re.DOTALL)
        assert count == 1
        path.write_text(damaged)
        with pytest.raises(RuntimeError, match="actsparse"):
            make_core().read_model(path)


def test_sites_below_the_least_sparsity_stay_as_they_are(
    make_sparse: Callable[..., ov.Model], tokens: np.ndarray
) -> None:
    model = make_sparse()
    before = logits(model, tokens)
    report = accelerate(model, min_sparsity=0.6, dense="none")
    assert not report.accelerated
    assert all("min_sparsity" in site.reason for site in report.kept)
    np.testing.assert_array_equal(logits(model, tokens), before)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_least_sparsity_outside_0_to_1_is_refused(make_sparse: Callable[..., ov.Model], value: float) -> None:
    model = make_sparse()
    with pytest.raises(ActsparseError, match="min_sparsity"):
        accelerate(model, min_sparsity=value)
    assert count_masks(model)


def test_an_unknown_word_for_dense_layers_is_refused(make_sparse: Callable[..., ov.Model]) -> None:
    model = make_sparse()
    with pytest.raises(ActsparseError, match="dense must be one of none, head, all, not 'heads'"):
        accelerate(model, dense="heads")
    assert count_masks(model)


def test_weights_that_the_kernel_would_round_stay_and_are_named(
    make_openvino_model: Callable[..., ov.Model], make_batches: Callable[..., Any], tokens: np.ndarray
) -> None:
    model = make_openvino_model("llama")
    sparsify_activations(model, make_batches(), 0.5)
    before = logits(model, tokens)
    report = accelerate(model)
    assert not report.accelerated
    assert all("f32" in site.reason for site in report.kept)
    np.testing.assert_array_equal(logits(model, tokens), before)


def test_without_a_compiler_the_portable_graph_stays_and_one_warning_says_so(
    make_sparse: Callable[..., ov.Model],
    tokens: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail() -> Path:
        message = "no C++ compiler was found"
        raise BuildError(message)

    monkeypatch.setattr("actsparse.openvino.acceleration.extension_path", fail)
    monkeypatch.setattr("actsparse.openvino.build._is_explained", threading.Event())
    model = make_sparse()
    before = logits(model, tokens)
    with caplog.at_level(logging.WARNING, logger="actsparse"):
        reports = [accelerate(model), accelerate(model)]
    assert all(not report.accelerated and len(report.kept) == 8 for report in reports)
    assert len(caplog.records) == 1
    assert "no C++ compiler" in caplog.text
    np.testing.assert_array_equal(logits(model, tokens), before)


def test_nan_spreads_as_in_a_dense_layer(make_sparse: Callable[..., ov.Model]) -> None:
    model = make_sparse()
    accelerate(model)
    node = next(node for node in model.get_ops() if node.get_type_name() == "SparseLinear")
    features = node.get_input_partial_shape(0)[2].get_length()
    x = ov.opset13.parameter([1, -1, features], np.float32)
    node.input(0).replace_source_output(x.output(0))
    alone = make_model_of([ov.opset13.result(output) for output in node.outputs()], x)
    request = ov.Core().compile_model(alone, "CPU").create_infer_request()
    for length in (1, 2, 20):
        values = np.ones((1, length, features), np.float32)
        values[0, -1, 3] = np.nan
        result = request.infer([values])[0]
        assert np.isnan(result[0, -1]).all()
        assert not np.isnan(result[0, :-1]).any()


def test_two_models_and_concurrent_requests_do_not_disturb_each_other(
    make_sparse: Callable[..., ov.Model],
) -> None:
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 64, (1, 9)) for _ in range(6)]
    models = [make_sparse(), make_sparse(mode="INT4_ASYM")]
    for model in models:
        accelerate(model)
    compiled = [ov.Core().compile_model(model, "CPU", {**EXACT, "NUM_STREAMS": "2"}) for model in models]
    results: list[Any] = [None] * len(prompts)

    def run(i: int) -> None:
        request = compiled[i % 2].create_infer_request()
        for _ in range(5):
            request.reset_state()
            results[i] = request.infer(inputs(prompts[i]))[0].copy()

    for i in range(len(prompts)):
        run(i)
    expected, results[:] = list(results), [None] * len(prompts)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, reference in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-4)


def test_the_runner_runs_accelerated_models(make_sparse: Callable[..., ov.Model], tokens: np.ndarray) -> None:
    model = make_sparse()
    portable = next(iter(Runner(model).run({"input_ids": tokens}).values())).copy()
    accelerate(model, exact=True)
    result = next(iter(Runner(model).run({"input_ids": tokens}).values()))
    assert relative_error(result, portable) < 1e-4

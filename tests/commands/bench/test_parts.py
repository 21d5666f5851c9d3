"""The pieces of the benchmark, each with figures known beforehand."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from actsparse.commands.bench import memory as memory_module
from actsparse.commands.bench import prepare as prepare_module
from actsparse.commands.bench.apart import CrashError, compile_decoders, run_apart
from actsparse.commands.bench.decoder import Decoder, find_unknown_inputs, make_core, make_settings
from actsparse.commands.bench.memory import (
    MemorySpeed,
    available_memory,
    measure_memory,
    require_memory,
)
from actsparse.commands.bench.prepare import SHAPES, count_parameters, find_source, make_random_model, prepare_dense
from actsparse.commands.bench.results import BenchReport, Point, Quantiles, Side, Timing
from actsparse.commands.bench.sparse import Reads
from actsparse.commands.bench.timing import time_decoding, time_first_token
from actsparse.commands.bench.tokens import make_random_tokens, make_sequences
from actsparse.errors import ActsparseError
from actsparse.openvino.build import extension_path
from actsparse.openvino.linear import find_linears
from actsparse.openvino.weights import read_weights
from actsparse.texts import load_pages

pytestmark = pytest.mark.slow


class Recorder:
    """A decoder that takes down what it is fed, in a list that all share."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        self.name, self.calls, self.starts = name, calls, 0

    def start(self) -> None:
        self.starts += 1

    def feed(self, tokens: np.ndarray) -> None:
        self.calls.append((self.name, tokens.shape[1]))


@pytest.fixture
def calls() -> list[tuple[str, int]]:
    return []


@pytest.fixture
def recorders(calls: list[tuple[str, int]]) -> Iterator[Any]:
    yield {name: Recorder(name, calls) for name in ("a", "b", "c")}


def test_models_decode_turn_by_turn_and_the_first_tokens_are_not_counted(recorders: Any, calls: Any) -> None:
    times = time_decoding(recorders, np.zeros((1, 20), np.int64), num_prompt_tokens=8, num_discarded=5)
    assert {name: len(values) for name, values in times.items()} == {"a": 7, "b": 7, "c": 7}
    assert calls[:3] == [("a", 8), ("b", 8), ("c", 8)]
    turns = [tuple(name for name, _ in calls[i : i + 3]) for i in range(3, len(calls), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 3, "the order must change"


def test_every_prompt_is_a_new_sequence(recorders: Any, calls: Any) -> None:
    times = time_first_token(recorders, np.zeros((1, 32), np.int64), (8, 32), repetitions=3)
    assert {n: {name: len(values) for name, values in by.items()} for n, by in times.items()} == {
        8: {"a": 3, "b": 3, "c": 3},
        32: {"a": 3, "b": 3, "c": 3},
    }
    assert all(recorder.starts == 6 for recorder in recorders.values())
    assert [length for _, length in calls[:6]] == [8, 8, 8, 32, 32, 32]


def test_each_figure_is_that_of_the_best_precision() -> None:
    fast = Timing(Quantiles(10, 9, 12), {32: 50.0, 128: 90.0})
    slow = Timing(Quantiles(12, 11, 14), {32: 40.0, 128: 100.0})
    dense = Side({"f32": slow, "bf16": fast}, 10, 1e9)
    sparse = Side({"f32": Timing(Quantiles(5, 4, 6), {32: 60.0, 128: 45.0})}, 10, 0.5e9)
    point = Point(0.5, Reads(0.55, 0.5, 0.9), dense, sparse, (1, 0))
    assert (dense.precision, dense.ttft) == ("bf16", {32: 40.0, 128: 90.0})
    assert point.decode_speedup == 2
    assert point.speedup_limit == 2
    assert point.ttft_ratio == {32: 1.5, 128: 0.5}
    assert dense.tokens_per_second == 100
    assert dense.bandwidth == 1e11


def test_a_batch_is_timed_with_the_precision_that_is_best_for_it() -> None:
    def timing(milliseconds: float) -> Timing:
        return Timing(Quantiles(1, 1, 1), {}, {4: Quantiles(milliseconds, milliseconds, milliseconds)})

    dense = Side({"f32": timing(9.0), "bf16": timing(6.0)}, 10, 1e9)
    sparse = Side({"f32": timing(4.0), "bf16": timing(5.0)}, 10, 1e9)
    point = Point(0.5, Reads(0.5, 0.5, 1.0), dense, sparse, (1, 0))
    assert point.batch_speedup == {4: 1.5}
    contents = point.to_dict(MemorySpeed(1e12, 2e12, 1e12))
    assert contents["batch_speedup"] == {"4": 1.5}
    assert [contents[side]["share_of_read_bandwidth"] for side in ("dense", "sparse")] == [0.5, 1.0]


def make_report(*points: tuple[float, float]) -> BenchReport:
    """Points of a measured sparsity and a speed-up."""

    def side(milliseconds: float) -> Side:
        return Side({"f32": Timing(Quantiles(milliseconds, milliseconds, milliseconds), {32: 1.0})}, 10, 1e9)

    made = (Point(s, Reads(s, s, 1.0), side(12.0), side(12.0 / speedup), (1, 0)) for s, speedup in points)
    return BenchReport({}, {}, tuple(made), MemorySpeed(1e9, 1e9, 1e9), {})


def test_the_sparsity_of_a_speedup_lies_on_the_line_through_the_times() -> None:
    # Times of 0.8, 0.6 and 0.4 of the dense one: 1 - s.
    report = make_report((0.2, 1 / 0.8), (0.4, 1 / 0.6), (0.6, 1 / 0.4))
    assert report.sparsity_for(2.0) == pytest.approx(0.5)
    assert report.sparsity_for(4.0) == pytest.approx(0.75)
    assert report.sparsity_for(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("points", [((0.5, 2.0),), ((0.5, 2.0), (0.501, 2.1)), ((0.3, 2.0), (0.6, 1.5))])
def test_points_that_tell_nothing_give_no_sparsity(points: Any) -> None:
    assert make_report(*points).sparsity_for(1.5) is None


def test_a_speedup_that_no_sparsity_reaches_has_none() -> None:
    assert make_report((0.2, 1.1), (0.6, 1.3)).sparsity_for(10.0) is None


def test_the_built_in_shapes_have_the_sizes_that_they_are_named_after() -> None:
    assert count_parameters(SHAPES["1b"]) == 1_100_048_384
    assert count_parameters(SHAPES["3b"]) == 3_212_749_824


def test_random_models_and_tokens_are_the_same_each_time() -> None:
    first, second = (make_random_model(SHAPES["tiny"]) for _ in range(2))
    assert all(p.equal(q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    tokens = [make_random_tokens(512, num_batches=2, calibration_length=8, length=16) for _ in range(2)]
    np.testing.assert_array_equal(tokens[0].measured, tokens[1].measured)
    assert tokens[0].calibration[1]["input_ids"].equal(tokens[1].calibration[1]["input_ids"])


def test_sequences_of_a_batch_begin_at_different_places() -> None:
    np.testing.assert_array_equal(make_sequences(np.arange(6)[None], 3, 4), [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1]])


def test_sequences_decoded_at_once_get_the_logits_of_each_alone() -> None:
    dense = prepare_dense(find_source("tiny"), "int8", lambda _: None)
    decoder = Decoder(ov.Core(), dense.xml, make_settings("f32", 1))
    sequences = np.arange(24).reshape(3, 8) * 7 % 512

    def decode(tokens: np.ndarray) -> np.ndarray:
        decoder.start()
        decoder.feed(tokens[:, :6])
        decoder.feed(tokens[:, 6:7])
        decoder.feed(tokens[:, 7:])
        return decoder.output(0).copy()

    alone = [decode(sequence[None])[0] for sequence in sequences]
    np.testing.assert_allclose(decode(sequences), alone, atol=0.02)


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "available_memory", lambda: 2**30)
    require_memory(2**29, "this")
    with pytest.raises(ActsparseError, match=r"this needs about 8\.0 GiB of memory, but 1\.0 GiB are free"):
        require_memory(2**33, "this")


def test_available_memory_is_less_than_there_is() -> None:
    available = available_memory()
    assert available is None or 0 < available < 2**50
    assert Path("/proc/meminfo").exists() == (available is not None)


def test_memory_is_copied_and_read_at_some_speed() -> None:
    memory = measure_memory(extension_path(), 2, 1 << 24)
    assert all(1e8 < speed < 1e13 for speed in (memory.copied, memory.read, memory.half_read))
    assert memory.to_dict().keys() == {"copy_gb_per_s", "read_all_rows_gb_per_s", "read_half_of_rows_gb_per_s"}


@pytest.fixture
def measure_tiny() -> Callable[[], int]:
    """Measure the tiny model's peak memory."""
    dense, extension = prepare_dense(find_source("tiny"), "int8", lambda _: None), extension_path()
    settings: dict[str, Any] = {"precision": "f32", "threads": 1, "vocabulary": 512, "prefill": 128}
    return lambda: run_apart(dense.xml, extension=extension, **settings)


def test_the_process_whose_memory_is_measured_imports_neither_torch_nor_nncf(
    monkeypatch: pytest.MonkeyPatch, measure_tiny: Callable[[], int]
) -> None:
    run, said = subprocess.run, []

    def run_and_list_imports(command: list[str], **settings: Any) -> Any:
        done = run([command[0], "-X", "importtime", *command[1:]], **settings)
        said.append(done.stderr)
        return done

    monkeypatch.setattr(subprocess, "run", run_and_list_imports)
    assert 20e6 < measure_tiny() < 2000e6
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in said[0].splitlines()}
    assert {"numpy", "openvino", "actsparse"} <= imported
    assert not imported & {"torch", "nncf", "transformers", "rich"}


def test_a_model_that_ends_its_process_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dense, extension = prepare_dense(find_source("tiny"), "int8", lambda _: None), extension_path()
    core, said = make_core(extension), []
    run = subprocess.run

    def run_and_die(command: list[str], **settings: Any) -> Any:
        killed = [command[0], "-c", "import os, signal; os.kill(os.getpid(), signal.SIGFPE)"]
        return run(killed if "sparse.xml" in command[-1] else command, **settings)

    monkeypatch.setattr(subprocess, "run", run_and_die)
    monkeypatch.setattr(f"{compile_decoders.__module__}.list_precisions", lambda _core: ("f32", "bf16"))
    sparse = tmp_path / "sparse.xml"
    ov.save_model(core.read_model(dense.xml), sparse)
    decoders = compile_decoders(core, {"dense": dense.xml, "sparse": sparse}, extension, 1, said.append)
    assert list(decoders) == [("dense", "f32"), ("dense", "bf16"), ("sparse", "f32")]
    assert said == [
        "sparse is not timed with bf16: OpenVINO was ended by SIGFPE when it ran sparse.xml with bf16 on 1 threads"
    ]
    with pytest.raises(CrashError, match="SIGFPE"):
        run_apart(sparse, extension=extension, precision="f32", threads=1)


def test_f16_weights_are_timed_on_one_thread_whatever_openvino_makes_of_them() -> None:
    # Where processors compute in bf16, OpenVINO 2026.4 divides by zero.
    dense, extension = prepare_dense(find_source("tiny"), "f16", lambda _: None), extension_path()
    decoders = compile_decoders(make_core(extension), {"dense": dense.xml}, extension, 1, lambda _: None)
    times = time_decoding(decoders, np.zeros((1, 20), np.int64), num_prompt_tokens=8, num_discarded=5)
    assert all(len(found) == 7 for found in times.values())
    assert ("dense", "f32") in times


def test_a_module_in_the_working_folder_is_not_taken_for_a_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measure_tiny: Callable[[], int]
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('this is not numpy')")
    monkeypatch.chdir(tmp_path)
    assert measure_tiny() > 20e6


def test_more_memory_than_can_be_addressed_is_one_line() -> None:
    with pytest.raises(ActsparseError, match="there is no memory of"):
        measure_memory(extension_path(), 1, 1 << 48)


def test_inputs_that_cannot_be_made_are_named() -> None:
    assert find_unknown_inputs(["input_ids", "attention_mask", "token_type_ids", "pixels"]) == [
        "pixels",
        "token_type_ids",
    ]


@pytest.mark.parametrize(("weights", "kind"), [("int8", "u8"), ("int4", "u4")])
def test_weights_are_stored_as_they_were_asked_for(weights: str, kind: str) -> None:
    dense = prepare_dense(find_source("tiny"), weights, lambda _: None)
    linears = find_linears(ov.Core().read_model(dense.xml))
    blocks = {x.constant.get_output_element_type(0).get_type_name() for x in linears if ".layers." in x.module_name}
    assert blocks == {kind}


# ---- INT4 weights


@pytest.fixture
def tiny_text(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(prepare_module, "load_pages", lambda *_, **__: load_pages(files / "calibration.txt"))
    monkeypatch.setattr(prepare_module, "AWARE_DATA", {"most": 8, "length": 32})


def test_aware_weights_are_int4_kept_by_group_size_and_data(
    tiny_text: None, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del tiny_text
    source = find_source(str(files / "model"))
    made = {size: prepare_dense(source, "int4-aware", print, group_size=size) for size in (16, 32)}
    assert prepare_dense(source, "int4-aware", pytest.fail, group_size=16) == made[16]
    assert made[16].folder != made[32].folder
    for size, dense in made.items():
        first = next(find_linears(ov.Core().read_model(dense.xml)))
        assert read_weights(first).group_size == size
        assert dense.load_tokenizer() is not None
    monkeypatch.setattr(prepare_module, "AWARE_DATA", {"most": 4, "length": 32})
    said: list[str] = []
    assert prepare_dense(source, "int4-aware", said.append, group_size=16).folder != made[16].folder
    assert "compressing its weights to int4-aware (once)" in said


def test_int4_weights_may_have_another_group_size(files: Path) -> None:
    source = find_source(str(files / "model"))
    plain, small = prepare_dense(source, "int4", print), prepare_dense(source, "int4", print, group_size=16)
    assert plain.folder != small.folder
    assert prepare_dense(source, "int4", pytest.fail, group_size=128).folder == plain.folder
    assert read_weights(next(find_linears(ov.Core().read_model(small.xml)))).group_size == 16


@pytest.mark.parametrize(
    ("name", "weights", "group_size", "message"),
    [
        ("tiny", "int8", 64, "^int8 weights have no groups: a group size goes with int4 and int4-aware$"),
        ("tiny", "int4", 0, "^the group size is 0; it must be a whole number, at least 1$"),
        ("tiny", "int4-aware", None, "^tiny has random weights, .*: take int4, not int4-aware$"),
    ],
)
def test_weights_that_cannot_be_made_are_refused_at_once(
    name: str, weights: str, group_size: int | None, message: str
) -> None:
    with pytest.raises(ActsparseError, match=message):
        prepare_dense(find_source(name), weights, pytest.fail, group_size=group_size)

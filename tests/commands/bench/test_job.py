"""The whole benchmark on a tiny shape, and what it says to mistakes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from actsparse.commands.bench import job as job_module
from actsparse.commands.bench import memory
from actsparse.commands.bench.job import BenchJob, parse_numbers, run_bench
from actsparse.commands.bench.prepare import find_source, prepare_dense
from actsparse.commands.bench.results import BenchReport, make_tables
from actsparse.errors import ActsparseError
from actsparse.openvino.toolchain import BuildError

pytestmark = pytest.mark.slow


def ignore(message: str) -> None:
    del message


def test_every_sparsity_is_a_point_with_both_sides(measured: Any) -> None:
    points = measured.result["points"]
    assert [point["target"] for point in points] == [0.3, 0.7]
    for point in points:
        assert point["measured_sparsity"] == pytest.approx(point["target"], abs=0.06)
        assert 0 < point["weight_reads_skipped"] < point["measured_sparsity"]
        assert set(point["ttft_ratio"]) == {"8", "32"}
        assert set(point["batch_speedup"]) == {"1", "3"}
        assert point["batch_speedup"]["1"] == point["decode_speedup"]
        dense, sparse = point["dense"], point["sparse"]
        assert point["decode_speedup"] == pytest.approx(
            dense["decode_ms"]["median"] / sparse["decode_ms"]["median"], rel=0.01
        )
        for side in (dense, sparse):
            assert side["decode_ms"]["p10"] <= side["decode_ms"]["median"] <= side["decode_ms"]["p90"]
            assert side["decode_ms"] == side["by_precision"][side["precision"]]["decode_ms"]
            assert side["ttft_ms"]["8"] == min(t["ttft_ms"]["8"] for t in side["by_precision"].values())
            assert side["batch_ms"]["3"]["median"] == min(
                t["batch_ms"]["3"]["median"] for t in side["by_precision"].values()
            )
            assert 20 < side["peak_rss_mb"] < 2000
        assert sparse["weight_bytes_per_token"] == pytest.approx(
            dense["weight_bytes_per_token"] * (1 - point["weight_reads_skipped"]), rel=1e-3
        )
        assert point["layers"] == {"accelerated": 14, "masked_only": 0}


def test_the_dense_side_reads_the_weights_of_all_linear_layers(measured: Any) -> None:
    block = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256
    assert measured.result["points"][0]["dense"]["weight_bytes_per_token"] == 2 * block + 128 * 512


def test_the_json_says_what_it_was_measured_with(measured: Any) -> None:
    result = measured.result
    assert result["settings"]["model"] == "tiny"
    assert result["settings"]["weights"] == "int8"
    assert result["seeds"] == {"weights": 0, "tokens": 1}
    assert result["environment"]["versions"]["openvino"]
    assert result["environment"]["openvino_build"]
    assert result["copy_gb_per_s"] > 0
    for side, read in (("dense", result["read_all_rows_gb_per_s"]), ("sparse", result["read_half_of_rows_gb_per_s"])):
        for point in result["points"]:
            share = point[side]["weight_bytes_per_token"] / point[side]["decode_ms"]["median"] / 1e6 / read
            assert point[side]["share_of_read_bandwidth"] == pytest.approx(share, abs=1e-3, rel=0.01)


def test_an_only_point_stands_at_the_top_too(measured: Any) -> None:
    assert "decode_speedup" not in measured.result
    report: BenchReport = replace(measured.report, points=measured.report.points[:1])
    result = report.to_dict()
    assert result["decode_speedup"] == result["points"][0]["decode_speedup"]
    assert result["dense"]["decode_ms"]["median"] > 0


def test_the_tables_and_the_plot_show_every_point(measured: Any) -> None:
    tables = make_tables(measured.report)
    assert [table.row_count for table in tables] == [4, 4, 4]
    assert measured.plot.read_bytes().startswith(b"\x89PNG")


def test_the_dense_model_is_made_once_and_nothing_else_stays_in_the_cache(measured: Any, cache: Path) -> None:
    del measured
    said: list[str] = []
    prepare_dense(find_source("tiny"), None, said.append)
    assert said == []
    assert [path.name for path in cache.iterdir()] == ["dense"]


@dataclass(frozen=True)
class Mistake:
    name: str
    settings: dict[str, Any]
    message: str


MISTAKES = [
    Mistake("sparsity above 1", {"sparsities": ("0.5,1.5",)}, "in range [0, 1], not 1.5"),
    Mistake("sparsity not a number", {"sparsities": ("half",)}, "--sparsity takes numbers"),
    Mistake("sparsity twice", {"sparsities": ("0.5", "0.5")}, "twice"),
    Mistake("two kinds of target", {"sparsities": ("0.5",), "roles": ("ffn.down=0.5",)}, "give either"),
    Mistake("target without number", {"targets": (".*down.*",)}, "--target takes PATTERN=S"),
    Mistake("unknown weights", {"weights": "int9"}, "int8, int4, int4-aware, f16"),
    Mistake("too few tokens", {"num_tokens": 3}, "--tokens is 3"),
    Mistake("too many threads", {"threads": 10_000}, "--threads is 10000"),
    Mistake("empty prompt", {"prompt_lengths": (0,)}, "--prompt-lengths is 0"),
    Mistake("empty batch", {"batch_sizes": (0, 4)}, "--batch-sizes is 0"),
    Mistake("batch too large", {"batch_sizes": (257,)}, "it must be in [1, 256]"),
    Mistake("speed-up below 1", {"target_speedup": 0.5, "sparsities": ("0.3,0.6",)}, "must be above 1"),
    Mistake("speed-up from one point", {"target_speedup": 1.5, "sparsities": ("0.5",)}, "at least two points"),
    Mistake("no such thresholds", {"thresholds": Path("nowhere")}, "no thresholds file"),
    Mistake("text for random weights", {"text": "wikitext"}, "random weights"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_found_before_anything_starts(mistake: Mistake) -> None:
    with pytest.raises(ActsparseError, match=".") as caught:
        BenchJob("tiny", **mistake.settings)
    assert mistake.message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "32,", "a", "1.5"])
def test_lengths_and_sizes_are_whole_numbers(text: str) -> None:
    with pytest.raises(ActsparseError, match="--batch-sizes takes whole numbers"):
        parse_numbers("--batch-sizes", text)
    assert parse_numbers("--batch-sizes", "512,32,512") == (32, 512)


def test_without_the_extension_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        msg = "there is no C++ compiler"
        raise BuildError(msg)

    monkeypatch.setattr(job_module, "extension_path", fail)
    with pytest.raises(ActsparseError, match="no C\\+\\+ compiler"):
        run_bench(BenchJob("tiny"), ignore)


def test_prompts_longer_than_the_model_reads_are_refused(measured: Any) -> None:
    with pytest.raises(ActsparseError, match="reads at most 256 tokens"):
        run_bench(BenchJob("tiny", prompt_lengths=(257,)), ignore)


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * 2**30)
    said: list[str] = []
    with pytest.raises(ActsparseError, match=r"3b in one process needs about .* GiB of memory, but 8\.0 GiB are free"):
        run_bench(BenchJob("3b"), said.append)
    assert said == []


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ActsparseError, match="is a folder"):
        run_bench(BenchJob("tiny", plot=tmp_path), ignore)


def test_unknown_shapes_are_told_from_hub_models() -> None:
    with pytest.raises(ActsparseError, match="no built-in shape '7b'; there are: 1b, 1b-relu, 3b"):
        run_bench(BenchJob("7b"), ignore)


def test_weights_of_an_openvino_model_cannot_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(ActsparseError, match="leave --weights out"):
        run_bench(BenchJob(str(tmp_path), weights="int4"), ignore)

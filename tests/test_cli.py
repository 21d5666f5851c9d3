"""The command line, on a tiny model in a folder; and what it says to a user's mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from actsparse import cli
from actsparse.commands import common
from actsparse.commands.bench import decoding
from actsparse.openvino.toolchain import BuildError
from actsparse.thresholds import read_thresholds


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["actsparse", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def sparsify(monkeypatch: pytest.MonkeyPatch, files: Path, out: Path, *options: str | Path) -> int:
    texts = ("--calibration", files / "calibration.txt", "--batches", "4")
    return run(monkeypatch, "sparsify", files / "model", "--out", out, *texts, *options)


def test_sparsify_writes_a_folder_that_evaluate_reads(monkeypatch, files, tmp_path, capsys):
    options = ("--role", "ffn.down=0.5", "--target", ".*up_proj.*=0.3", "--int8", "asym")
    figures = tmp_path / "sparsify.json"
    assert sparsify(monkeypatch, files, tmp_path / "out", *options, "--json", figures) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"thresholds.safetensors", "report.json", "sparsity_by_layer.png"}
    measured = json.loads(figures.read_text())["calibration_sparsity"]["by_role"]
    assert measured == {"ffn.up": pytest.approx(0.3, abs=0.01), "ffn.down": pytest.approx(0.5, abs=0.01)}
    with safe_open(tmp_path / "out" / "thresholds.safetensors", framework="pt") as file:
        assert len(file.keys()) == 4

    evaluated = tmp_path / "evaluate.json"
    text = ("--text", files / "evaluation.txt", "--max-length", "64")
    assert run(monkeypatch, "evaluate", tmp_path / "out", *text, "--json", evaluated) == 0
    row = json.loads(evaluated.read_text())["rows"][0]
    assert set(row["sparsity"]["by_layer"]) == {
        f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("up", "down")
    }
    assert row["word_perplexity"] > 1
    assert "INT8_ASYM" in capsys.readouterr().out


def test_sparsify_masks_zeros_without_a_sparsity(monkeypatch, files, tmp_path, capsys):
    config = shutil.copytree(files / "model", tmp_path / "relu") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "relu"}))
    texts = ("--calibration", files / "calibration.txt", "--text", files / "evaluation.txt", "--batches", "2")
    options = (*texts, "--max-length", "64", "--int8", "asym", "--json", tmp_path / "figures.json")
    command = ("sparsify", tmp_path / "relu", "--out", tmp_path / "out", "--algorithm", "zeros")
    assert run(monkeypatch, *command, *options) == 0
    dense, sparse = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert sparse["word_perplexity"] == dense["word_perplexity"]
    assert 0.3 < sparse["sparsity"]["sparsity"] < 0.7
    for more in (("--sparsity", "0.5"), ("--max-perplexity-increase", "0.1")):
        capsys.readouterr()
        assert run(monkeypatch, *command, *more, *options) == 2
        assert "zero" in capsys.readouterr().err


def test_sparsify_with_a_text_compares_dense_and_sparse(monkeypatch, files, tmp_path, capsys):
    text = ("--text", files / "evaluation.txt", "--max-length", "64")
    assert sparsify(monkeypatch, files, tmp_path / "out", "--sparsity", "0.6", *text) == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "sparse"]
    assert rows[0]["sparsity"] is None
    assert rows[1]["sparsity"]["sparsity"] == pytest.approx(0.6, abs=0.1)
    assert rows[0]["word_perplexity"] != rows[1]["word_perplexity"]
    # The dense row is the model as evaluate alone sees it.
    alone = tmp_path / "alone.json"
    assert run(monkeypatch, "evaluate", files / "model", *text, "--json", alone) == 0
    alone_row = json.loads(alone.read_text())["rows"][0]
    assert alone_row["word_perplexity"] == pytest.approx(rows[0]["word_perplexity"], rel=1e-6)


def test_sparsify_finds_the_sparsity_that_a_perplexity_allows(monkeypatch, files, tmp_path, capsys):
    options = ("--max-perplexity-increase", "0.05", "--held-out", files / "evaluation.txt", "--algorithm", "magnitude")
    assert sparsify(monkeypatch, files, tmp_path / "out", *options) == 0
    budget = json.loads((tmp_path / "out" / "report.json").read_text())["budget"]
    taken = [step for step in budget["steps"] if step["target"] == budget["target"]]
    assert taken[-1]["perplexity_increase"] <= 0.05
    assert len(budget["steps"]) <= 15
    records = read_thresholds(tmp_path / "out" / "thresholds.safetensors").masks
    assert {record.target_sparsity for record in records.values()} == {budget["target"]}
    assert "taken" in capsys.readouterr().out


@pytest.mark.parametrize("int8", [(), ("--int8", "asym")])
def test_sparsify_recovers_and_saves_the_weights(int8, monkeypatch, files, tmp_path):
    out = tmp_path / "out"
    text = ("--text", files / "evaluation.txt", "--max-length", "64")
    options = ("--sparsity", "0.5", "--recover", "3", "--training", files / "calibration.txt", *int8, *text)
    assert sparsify(monkeypatch, files, out, *options) == 0
    result = json.loads((out / "report.json").read_text())
    assert result["recovery"]["steps"] == 3
    assert result["recovery"]["divergence_after"] <= result["recovery"]["divergence_before"]
    assert not (out / "recovery.checkpoint").exists()
    # The folder is a model of its own, masks and all.
    evaluated = tmp_path / "evaluate.json"
    assert run(monkeypatch, "evaluate", out, *text, "--json", evaluated) == 0
    row = json.loads(evaluated.read_text())["rows"][0]
    assert row["word_perplexity"] == pytest.approx(result["rows"][1]["word_perplexity"], rel=1e-4)
    assert row["sparsity"]["sparsity"] == pytest.approx(result["rows"][1]["sparsity"]["sparsity"], abs=1e-3)


def test_sparsify_recovers_biases_alone_and_saves_them_with_the_thresholds(monkeypatch, files, tmp_path, capsys):
    out = tmp_path / "out"
    text = ("--text", files / "evaluation.txt", "--max-length", "64")
    options = ("--sparsity", "0.6", "--int8", "asym", "--training", files / "calibration.txt")
    recovering = ("--recover", "3", "--train", "bias", "--fail-above", "100")
    assert sparsify(monkeypatch, files, out, *options, *recovering, *text) == 0
    result = json.loads((out / "report.json").read_text())
    assert result["recovery"]["steps"] == 3
    assert result["recovery"]["divergence_after"] <= result["recovery"]["divergence_before"]
    assert not (out / "config.json").exists()
    assert not (out / "recovery.checkpoint").exists()
    masks = read_thresholds(out / "thresholds.safetensors").masks
    assert all((mask.compensation.bias is None) == mask.is_of_rows for mask in masks.values())
    for wrong, message in ((("--train", "all", "--recover", "3"), "nearest"), (("--train", "bias"), "--recover STEPS")):
        assert sparsify(monkeypatch, files, out, "--sparsity", "0.6", *wrong) == 2
        assert message in capsys.readouterr().err


def demo(monkeypatch: pytest.MonkeyPatch, files: Path, out: Path) -> int:
    texts = ("--text", files / "evaluation.txt", "--calibration", files / "calibration.txt", "--batches", "4")
    return run(monkeypatch, "demo", "--model", files / "model", "--out", out, *texts)


def test_demo_writes_its_rows_and_files(monkeypatch, files, tmp_path, capsys, own_cache):
    out = tmp_path / "demo"
    assert demo(monkeypatch, files, out) == 0
    report = json.loads((out / "report.json").read_text())
    assert [row["sparsity"] is None for row in report["rows"]] == [True, False, False, False]
    assert report["rows"][3]["sparsity"]["sparsity"] == pytest.approx(0.4, abs=0.1)
    assert {p.name for p in out.iterdir()} == {
        "report.json", "report.md", "thresholds.safetensors", "sparsity_by_layer.png"
    }  # fmt: skip
    assert (out / "report.md").read_text().count("\n|") == 6 + 5
    timed = report["decoding"]
    dense, *sparse = timed["rows"]
    assert [row["name"] for row in sparse] == ["up/gate 30% + down 50%, accelerated", "uniform 50%, accelerated"]
    for row in timed["rows"]:
        assert row["speedup"] == pytest.approx(dense["decode_ms"]["median"] / row["decode_ms"]["median"], rel=0.01)
    assert timed["settings"]["processor"]
    assert timed["settings"]["threads"] >= 1
    printed = capsys.readouterr().out
    assert "uniform 40%" in printed
    assert "How fast it decodes" in printed


def test_demo_without_a_compiler_says_in_one_line_why_decoding_is_not_timed(
    monkeypatch, files, tmp_path, capsys, own_cache
):
    def fail() -> Path:
        msg = "there is no C++ compiler"
        raise BuildError(msg)

    monkeypatch.setattr(decoding, "extension_path", fail)
    assert demo(monkeypatch, files, tmp_path / "demo") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "decoding was not timed: there is no C++ compiler"
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["decoding"] == {
        "reason": "there is no C++ compiler"
    }
    assert "Decoding was not timed: there is no C++ compiler." in (tmp_path / "demo" / "report.md").read_text()


@dataclass(frozen=True)
class Mistake:
    name: str
    arguments: tuple[str, ...]
    message: str


MODEL, OUT, CALIBRATION = "{files}/model", "{out}", ("--calibration", "{files}/calibration.txt", "--batches", "4")
SPARSIFY = ("sparsify", MODEL, "--out", OUT, *CALIBRATION)
EVALUATE, TEXT = ("evaluate", MODEL), ("--text", "{files}/evaluation.txt")
MISTAKES = [
    Mistake("no command", (), "Missing command"),
    Mistake("unknown command", ("demmo",), "No such command 'demmo'"),
    Mistake("no model", ("sparsify", "--out", OUT), "Missing argument 'MODEL'"),
    Mistake("unknown option", (*SPARSIFY, "--sparsty", "0.5"), "No such option"),
    Mistake("not a number of pages", (*EVALUATE, "--pages", "two"), "valid integer"),
    Mistake("no target", SPARSIFY, "give either --sparsity S, or one or more of"),
    Mistake("two kinds of target", (*SPARSIFY, "--sparsity", "0.5", "--role", "ffn.down=0.5"), "give either"),
    Mistake("target above 1", (*SPARSIFY, "--sparsity", "1.1"), "in range [0, 1], not 1.1"),
    Mistake("negative target", (*SPARSIFY, "--role", "ffn.down=-0.1"), "in range [0, 1], not -0.1"),
    Mistake("target not a number", (*SPARSIFY, "--target", ".*down.*=half"), "--target takes PATTERN=S"),
    Mistake("target nan", (*SPARSIFY, "--sparsity", "nan"), "in range [0, 1], not nan"),
    Mistake("unmatched pattern", (*SPARSIFY, "--target", ".*dwon_proj.*=0.5"), "nearest: "),
    Mistake("unknown role", (*SPARSIFY, "--role", "ffn.dwon=0.5"), "nearest: ffn.down"),
    Mistake("role the model lacks", (*SPARSIFY, "--role", "ffn.in=0.5"), "role 'ffn.in' matches no layer"),
    Mistake("not a regular expression", (*SPARSIFY, "--target", "(=0.5"), "is not a regular expression"),
    Mistake("only embeddings", (*SPARSIFY, "--target", ".*embed_tokens.*=0.5"), "matches no Linear layer"),
    Mistake("matched twice", (*SPARSIFY, "--role", "ffn.down=0.5", "--target", ".*down.*=0.4"), "multiple items"),
    Mistake("unknown algorithm", (*SPARSIFY, "--sparsity", "0.5", "--algorithm", "magnitud"), "nearest: magnitude"),
    Mistake("unknown INT8 mode", (*SPARSIFY, "--sparsity", "0.5", "--int8", "asymm"), "nearest: asym"),
    Mistake("too few tokens", (*SPARSIFY, "--sparsity", "0.5", "--batches", "99"), "too short"),
    Mistake("no such model", ("evaluate", "./nowhere"), "nowhere"),
    Mistake("no such text", (*EVALUATE, "--text", "{files}/evaluatoin.txt"), "evaluation.txt"),
    Mistake("empty text", (*EVALUATE, "--text", "{files}/empty.txt"), "empty"),
    Mistake("binary text", (*EVALUATE, "--text", "{files}/binary.txt"), "binary.txt"),
    Mistake("too long a window", (*EVALUATE, *TEXT, "--max-length", "9999"), "at most 512"),
    Mistake("no such thresholds", (*EVALUATE, *TEXT, "--thresholds", "x"), "no thresholds file"),
    Mistake(
        "thresholds that are text",
        (*EVALUATE, *TEXT, "--thresholds", "{files}/evaluation.txt"),
        "not a readable safetensors file",
    ),
    Mistake("output is a file", ("sparsify", MODEL, "--out", "{files}/empty.txt", "--sparsity", "0.5"), "is a file"),
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_line_and_exit_code_2_and_writes_nothing(monkeypatch, files, tmp_path, capsys, mistake):
    out = tmp_path / "out"
    arguments = [argument.format(files=files, out=out) for argument in mistake.arguments]
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert mistake.message in last
    assert captured.out == ""
    assert not out.exists() or not any(out.iterdir())


def test_an_interrupted_run_leaves_nothing_half_written(files, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "actsparse", "sparsify", str(files / "model"), "--out", str(out)]
    options = ["--calibration", str(files / "calibration.txt"), "--batches", "4", "--sparsity", "0.5"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("loading"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    is_complete = (out / "sparsity_by_layer.png").is_file()
    # While Python shuts down, its own handler is gone.
    if is_complete and process.returncode in (0, -signal.SIGINT):
        pytest.skip("the run was over before the signal arrived")
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("error: interrupted")
    # Whatever is there is whole, however late the signal came; nothing else is.
    for path in out.iterdir():
        assert path.name in {"thresholds.safetensors", "report.json", "sparsity_by_layer.png"}
        assert path.suffix != ".safetensors" or len(read_thresholds(path).thresholds) == 14
        assert path.suffix != ".json" or json.loads(path.read_text())["settings"]


@pytest.mark.real_model
def test_the_fast_demo_runs_on_the_default_model(monkeypatch, tmp_path, capsys):
    # An eighth of the data that it calibrates with, and few tokens to time.
    monkeypatch.setattr(common, "CALIBRATION_LENGTH", 32)
    monkeypatch.setattr(decoding, "CALIBRATION_LENGTH", 32)
    monkeypatch.setattr(decoding, "TIMED_TOKENS", 8)
    assert run(monkeypatch, "demo", "--fast", "--pages", "1", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    dense, *sparse = (row["word_perplexity"] for row in rows)
    assert all(dense < perplexity < 2 * dense for perplexity in sparse)
    printed = capsys.readouterr().out
    assert "pages" in printed
    assert "How fast it decodes" in printed

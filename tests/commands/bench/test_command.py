"""`actsparse bench` as a user types it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from actsparse import TargetScope, cli, save_thresholds, sparsify_activations
from actsparse.commands.bench.prepare import find_source, prepare_dense

pytestmark = pytest.mark.slow


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["actsparse", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_an_openvino_folder_is_measured_as_it_is_with_targets_by_role(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    folder = prepare_dense(find_source("tiny"), "int8", lambda _: None).folder
    lengths = ("--prompt-lengths", "8", "--tokens", "10", "--batches", "1", "--batch-sizes", "2")
    options = ("--role", "ffn.down=0.6", "--exact", *lengths, "--json", tmp_path / "bench.json")
    assert run(monkeypatch, folder, *options) == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["target"] == {"ffn.down": 0.6}
    assert result["layers"] == {"accelerated": 2, "masked_only": 0}
    assert result["settings"]["weights"] == "as stored"
    assert result["settings"]["kernel"] == "exact (24-bit activations)"
    assert result["seeds"] == {"tokens": 1}
    printed = capsys.readouterr()
    assert "sparse ffn.down=0.6" in printed.out
    assert "Time to first token" in printed.out
    assert "Decoding several sequences at once" in printed.out
    assert result["batch_speedup"].keys() == {"2"}


def test_the_masks_of_a_file_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    dense = prepare_dense(find_source("tiny"), "int8", lambda _: None)
    model = ov.Core().read_model(dense.xml)
    vocabulary = int(dense.config["vocab_size"])
    tokens = np.arange(64).reshape(1, 64) % vocabulary
    sparsify_activations(model, [{"input_ids": tokens}], {TargetScope(roles=("ffn.down",)): 0.7})
    save_thresholds(model, tmp_path / "masks.safetensors")
    options = ("--thresholds", tmp_path / "masks.safetensors", "--prompt-lengths", "8", "--tokens", "10")
    options += ("--batch-sizes", "1")
    assert run(monkeypatch, dense.folder, *options, "--json", tmp_path / "bench.json") == 0
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["target"] == "masks.safetensors"
    assert result["layers"] == {"accelerated": 2, "masked_only": 0}
    assert result["measured_sparsity"] == pytest.approx(0.7, abs=0.15)
    assert "sparse masks.safetensors" in capsys.readouterr().out
    assert run(monkeypatch, dense.folder, *options, "--sparsity", "0.5") == 2
    assert "leave --sparsity" in capsys.readouterr().err


def test_what_is_zero_by_itself_is_measured_as_one_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = ("--tokens", "10", "--prompt-lengths", "8", "--batch-sizes", "2", "--quiet")
    assert run(monkeypatch, "tiny-relu", "--zeros", *few, "--json", tmp_path / "zeros.json") == 0
    (point,) = json.loads((tmp_path / "zeros.json").read_text())["points"]
    assert point["target"] == "zeros"
    # Random weights alone would leave half of them.
    assert point["measured_sparsity"] > 0.75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument 'MODEL'"),
        (("tiny", "--zeros", "--sparsity", "0.5"), "--zeros says how sparse each layer is"),
        (("tiny", "--zeros", "--prompt-lengths", "8", "--quiet"), "no activations are zero by themselves"),
        (("tiny", "--sparsity", "2"), "in range [0, 1], not 2"),
        (("tiny", "--prompt-lengths", "short"), "--prompt-lengths takes whole numbers"),
        (("tiny", "--batch-sizes", "4-16"), "--batch-sizes takes whole numbers"),
        (("./nowhere",), "nowhere"),
    ],
    ids=[
        "no model",
        "zeros and a sparsity",
        "no zeros",
        "sparsity above 1",
        "lengths that are no numbers",
        "sizes that are no numbers",
        "no such model",
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err

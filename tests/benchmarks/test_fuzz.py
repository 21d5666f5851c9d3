"""A few inputs for every target, and that the harness sees what it is there to see."""

import importlib
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from actsparse.errors import ActsparseError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
INPUTS = 60


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield Namespace(main=importlib.import_module("fuzz"), targets=importlib.import_module("fuzz_targets"))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            sys.modules.pop(name)


def test_only_our_errors_come_out_of_any_target(fuzz: Any) -> None:
    for name, target in fuzz.targets.TARGETS.items():
        record = fuzz.main.feed_target(target, INPUTS, 1)
        assert (name, record.failures) == (name, {})
        assert record.count >= INPUTS
        assert record.slowest < fuzz.main.SLOW_S


def test_valid_inputs_of_every_target_are_taken(fuzz: Any, tmp_path: Path) -> None:
    targets = fuzz.targets
    valid = {
        "thresholds files": targets._save_thresholds({}, {}),
        "recovery checkpoints": targets.save({"trained/x": targets.torch.ones(2)}, targets._STATE),
        "scopes and patterns": {"patterns": [".*up_proj"]},
        "targets of a call": ([], [], 0.5, "magnitude"),
        "text sources": (".jsonl", targets._JSONL.encode()),
        "GGUF files": ([], None),
        "regression cases": targets.CASE.encode(),
        "regression references": targets._EXAMPLE.read_bytes(),
        "regression results": targets.json.dumps(targets._RESULT).encode(),
    }
    for name, target in targets.TARGETS.items():
        folder = tmp_path / name
        folder.mkdir()
        target.prepare(folder)(valid[name])


def raise_key_error(_: object) -> None:
    raise KeyError


def raise_two_lines(_: object) -> None:
    msg = "two\nlines"
    raise ActsparseError(msg)


@pytest.mark.parametrize(
    ("feed", "found"), [(raise_key_error, "KeyError in"), (raise_two_lines, "several lines")], ids=["error", "lines"]
)
def test_what_should_not_come_out_is_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch, feed: Any, found: str) -> None:
    target = fuzz.targets.Target(st.integers(), lambda _folder: feed)
    monkeypatch.setitem(fuzz.targets.TARGETS, "broken", target)
    record = fuzz.main.feed_target(target, 5, 0)
    assert len(record.failures) == 1
    assert found in next(iter(record.failures))
    assert fuzz.main.main(["--targets", "broken", "--inputs", "5"]) == 1


def test_a_slow_input_misses_the_bar(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz.main, "SLOW_S", 0.01)
    target = fuzz.targets.Target(st.just("x"), lambda _folder: lambda _value: time.sleep(0.02))
    monkeypatch.setitem(fuzz.targets.TARGETS, "slow", target)
    assert fuzz.main.main(["--targets", "slow", "--inputs", "1"]) == 1

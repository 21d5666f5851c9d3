"""The examples run as they stand, one after the other: the second applies what the first has saved."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.real_model
def test_examples_run_in_order(tmp_path):
    names = ["sparsify_and_measure.py", "apply_thresholds.py", "accelerate_and_generate.py"]
    assert sorted(names) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    for name in names:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "word perplexity" in done.stdout

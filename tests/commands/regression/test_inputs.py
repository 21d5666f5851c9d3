"""What a case runs on: which model it is, and what makes two runs incomparable."""

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.inputs import checksum_files, find_change, find_inputs, find_model
from actsparse.errors import SourceError


def test_a_checksum_is_what_sha256sum_says(write_case: Callable[..., Path], files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "model", tmp_path / "model")
    for name in ("calibration.txt", "evaluation.txt"):
        shutil.copy(files / name, tmp_path)
    path = Path(shutil.copy(write_case("checked"), tmp_path))
    case = read_case(path)
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    listing = subprocess.run(["sha256sum", *names], cwd=tmp_path / "model", capture_output=True, check=True).stdout
    checksum = checksum_files(find_model(case))
    assert checksum == hashlib.sha256(listing).hexdigest()
    before = find_inputs(case).describe(case)
    path.write_text(path.read_text() + f"checksum: {checksum}\n")
    checked = read_case(path)
    # That a case asks for its checksum makes it no other case.
    assert find_change(before, find_inputs(checked).describe(checked)) is None
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(SourceError, match=f"not {checksum}"):
        find_inputs(checked)
    assert "checksum of the model" in str(find_change(before, find_inputs(case).describe(case)))

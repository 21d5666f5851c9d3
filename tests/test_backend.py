"""OpenVINO models are told from others, without importing what is not there."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from actsparse.backend import backend_of, find_openvino_model
from actsparse.errors import ActsparseError


@pytest.mark.parametrize("other", [None, 3, torch.nn.Linear(2, 2), object()], ids=lambda value: type(value).__name__)
def test_anything_else_is_none(other: Any) -> None:
    assert find_openvino_model(other) is None


@pytest.mark.parametrize("other", [None, "llama", 3])
def test_what_is_no_model_is_refused(other: Any) -> None:
    with pytest.raises(ActsparseError, match=f"not {type(other).__name__}"):
        backend_of(other)


def test_looking_does_not_import_optimum() -> None:
    code = (
        "import sys; from actsparse.backend import backend_of, find_openvino_model as find; from torch import nn; "
        "assert find(3) is None; backend_of(nn.Linear(2, 2)); assert 'optimum' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

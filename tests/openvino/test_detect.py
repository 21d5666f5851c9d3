"""OpenVINO models are told from others, without importing what is not there."""

import subprocess
import sys
from typing import Any

import openvino as ov
import pytest
import torch
from optimum.intel import OVModelForCausalLM

from actsparse.openvino.detect import find_openvino_model, forget_compiled


def test_a_model_is_itself_and_optimums_is_what_it_wraps(openvino_llama: ov.Model, export_folder: Any) -> None:
    assert find_openvino_model(openvino_llama) is openvino_llama
    wrapped: Any = OVModelForCausalLM.from_pretrained(export_folder("llama"))
    assert find_openvino_model(wrapped) is wrapped.model
    forget_compiled(wrapped)
    assert wrapped.request is None
    forget_compiled(openvino_llama)


@pytest.mark.parametrize("other", [None, 3, torch.nn.Linear(2, 2), object()], ids=lambda value: type(value).__name__)
def test_anything_else_is_none(other: Any) -> None:
    assert find_openvino_model(other) is None


def test_looking_does_not_import_openvino() -> None:
    code = (
        "import sys; from actsparse.openvino.detect import find_openvino_model as find; "
        "assert find(3) is None; assert 'openvino' not in sys.modules and 'optimum' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Tiny OpenVINO models, converted once and read anew for every test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import pytest

from actsparse.openvino import export_model

MakeOpenVinoModel = Callable[..., ov.Model]

MODES: dict[str, tuple[nncf.CompressWeightsMode, dict[str, Any]]] = {
    "INT8_ASYM": (nncf.CompressWeightsMode.INT8_ASYM, {}),
    "INT8_SYM": (nncf.CompressWeightsMode.INT8_SYM, {}),
    "INT4_ASYM": (nncf.CompressWeightsMode.INT4_ASYM, {"group_size": 16}),
    "INT4_SYM": (nncf.CompressWeightsMode.INT4_SYM, {"group_size": 16}),
}


@pytest.fixture(scope="session")
def export_folder(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export `make_model`'s models without masks; each one once."""
    folders: dict[str, Path] = {}

    def export(architecture: str = "llama") -> Path:
        if architecture not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            folders[architecture] = export_model(make_model(architecture), folder)
        return folders[architecture]

    return export


@pytest.fixture(scope="session")
def make_openvino_model(export_folder: Callable[[str], Path]) -> MakeOpenVinoModel:
    """Convert `make_model`'s models; equal arguments give equal models."""

    def make(architecture: str = "llama", mode: str | None = None) -> ov.Model:
        model = ov.Core().read_model(export_folder(architecture) / "openvino_model.xml")
        if mode is None:
            return model
        compression, settings = MODES[mode]
        return nncf.compress_weights(model, mode=compression, **settings)

    return make


@pytest.fixture
def openvino_llama(make_openvino_model: MakeOpenVinoModel) -> ov.Model:
    return make_openvino_model("llama")


@pytest.fixture(scope="session")
def picture() -> Callable[[ov.Model], Any]:
    """Take down a model's graph and what it says of itself; equal pictures mean an unchanged model."""

    def take(model: ov.Model) -> Any:
        nodes = [
            (
                node.get_type_name(),
                node.get_friendly_name(),
                tuple(value.get_node().get_friendly_name() for value in node.input_values()),
            )
            for node in model.get_ordered_ops()
        ]
        return sorted(nodes), [port.get_names() for port in model.outputs], sorted(model.get_rt_info())

    return take

"""Tell OpenVINO models from others without importing OpenVINO or optimum-intel."""

import sys
from typing import Any

# What optimum-intel calls the model in a folder.
MODEL_FILE = "openvino_model.xml"


def find_openvino_model(model: Any) -> Any:
    """
    Find the OpenVINO model that something is, or wraps as optimum-intel's models do.

    :param model: Anything.
    :return: The `openvino.Model`, or None.
    """
    # Who holds an OpenVINO model has imported the library.
    model_type = getattr(sys.modules.get("openvino"), "Model", None)
    if model_type is None:
        return None
    if isinstance(model, model_type):
        return model
    inner = vars(model).get("model") if hasattr(model, "clear_requests") else None
    return inner if isinstance(inner, model_type) else None


def forget_compiled(model: Any) -> None:
    """
    Make an optimum-intel model compile anew when it is next used, because its graph has changed.

    :param model: An OpenVINO model, wrapped or not.
    """
    if hasattr(model, "clear_requests"):
        model.clear_requests()

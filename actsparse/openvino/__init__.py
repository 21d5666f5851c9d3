"""The OpenVINO backend: masks in an `openvino.Model`, and converting a masked torch model with its masks."""

from typing import TYPE_CHECKING

from actsparse.lazy import export_lazily

if TYPE_CHECKING:
    from actsparse.openvino.acceleration import Acceleration as Acceleration
    from actsparse.openvino.acceleration import accelerate as accelerate
    from actsparse.openvino.build import extension_path as extension_path
    from actsparse.openvino.deploy import deploy_model as deploy_model
    from actsparse.openvino.deploy import load_causal_lm as load_causal_lm
    from actsparse.openvino.export import export_model as export_model
    from actsparse.openvino.masks import Mask as Mask
    from actsparse.openvino.masks import count_masks as count_masks
    from actsparse.openvino.masks import find_masks as find_masks

# Imported when first asked for: telling an OpenVINO model from a torch module must not import OpenVINO.
_HOMES = {
    "Acceleration": "acceleration",
    "accelerate": "acceleration",
    "extension_path": "build",
    "Mask": "masks",
    "count_masks": "masks",
    "deploy_model": "deploy",
    "export_model": "export",
    "find_masks": "masks",
    "load_causal_lm": "deploy",
}

__getattr__, __dir__ = export_lazily(globals(), _HOMES)

"""The OpenVINO backend: masks in an `openvino.Model`, and converting a masked torch model with its masks."""

from actsparse.openvino.acceleration import Acceleration as Acceleration
from actsparse.openvino.acceleration import accelerate as accelerate
from actsparse.openvino.build import extension_path as extension_path
from actsparse.openvino.compression import compress_int4_aware as compress_int4_aware
from actsparse.openvino.deploy import deploy_model as deploy_model
from actsparse.openvino.deploy import load_causal_lm as load_causal_lm
from actsparse.openvino.export import export_model as export_model
from actsparse.openvino.graph_masks import GraphMask as Mask  # its public name since 0.1  # noqa: F401
from actsparse.openvino.graph_masks import count_masks as count_masks
from actsparse.openvino.graph_masks import find_masks as find_masks
from actsparse.openvino.twin import make_twin as make_twin

"""A torch model that computes with the weights that an OpenVINO model stores, so that it can be differentiated."""

import copy
from collections.abc import Mapping
from typing import Any

import openvino as ov
import torch
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from actsparse.calibration import describe_batch
from actsparse.errors import ActsparseError, DatasetError, shorten_message
from actsparse.openvino.inputs import make_inputs
from actsparse.openvino.linear import module_of_node
from actsparse.openvino.masks import replace_masks
from actsparse.openvino.parameters import StoredParameters
from actsparse.openvino.twin_check import require_equal
from actsparse.torch.backend import TorchBackend
from actsparse.torch.offload import require_weights

# What a batch may give the torch model; what else OpenVINO reads (states, beams) it has no use for.
_INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class ScaledActivation(nn.Module):
    """
    An activation function, and the scale that AWQ put behind it.

    :param function: The function.
    :param scale: What its output is multiplied by, [channels].
    """

    def __init__(self, function: nn.Module, scale: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute and scale."""
        return self.function(x) * self.scale


def make_twin(model: ov.Model, torch_model: nn.Module | PretrainedConfig, example: Any) -> nn.Module:
    """
    Make a torch model that computes with the weights of an OpenVINO model as they are stored, dequantised to f32.

    It shares what it can with `torch_model`. One batch is run through both, so that what differs is found at once.

    :param model: The OpenVINO model, compressed or not; its masks are left out. Not changed.
    :param torch_model: A torch model of the same architecture, with whatever weights, not changed; or a transformers
        configuration, of which one is made. No code of the model's source is ever run.
    :param example: A model input with `input_ids`.
    :return: The twin, in evaluation mode, without masks.
    :raises ActsparseError: If there is no such model, a weight cannot be read, or the twin computes something else.
    :raises DatasetError: If the example has no `input_ids`, or does not fit the model.
    """
    dense = model.clone()
    replace_masks(dense, {})
    batch = to_torch_inputs(dense, example)
    twin = _copy(torch_model) if isinstance(torch_model, nn.Module) else _build(torch_model)
    stored = StoredParameters(dense)
    for name, module in [*twin.named_modules()]:
        _fill(name, module, stored)
    for node, scale in stored.awq_scales():
        _scale_function(twin, node, scale)
    twin.eval()
    require_equal(dense, twin, batch)
    return twin


def to_torch_inputs(model: ov.Model, batch: Any) -> dict[str, Any]:
    """
    Turn a batch for an OpenVINO model into one for its twin.

    :param batch: What `make_inputs` takes, and `labels` where a loss is to be taken of them.
    :return: The tokens and what was given beside them, as tensors by name.
    :raises DatasetError: If it does not fit the model, or has no `input_ids`.
    """
    rest = batch
    labels: dict[str, Any] = {}
    if isinstance(batch, Mapping) and "labels" in batch:
        rest = {name: value for name, value in batch.items() if name != "labels"}
        labels = {"labels": torch.as_tensor(batch["labels"])}
    try:
        arrays = make_inputs(model, rest)
    except ActsparseError as error:
        msg = f"the model cannot take a batch of the dataset ({describe_batch(batch)}): {error}"
        raise DatasetError(msg) from None
    if "input_ids" not in arrays:
        msg = f"this algorithm measures language models on tokens, and the batch has none: {describe_batch(batch)}"
        raise DatasetError(msg)
    # Of a tuple, those that were given come first, before those that are made of them.
    given = [*map(str, rest)] if isinstance(rest, Mapping) else [*arrays][: len(rest) if isinstance(rest, tuple) else 1]
    return {name: torch.tensor(arrays[name]).long() for name in _INPUTS if name in given and name in arrays} | labels


def _copy(torch_model: nn.Module) -> nn.Module:
    require_weights(torch_model, "making a twin")
    if hasattr(torch_model, ATR_HOOK_STORAGE):
        msg = "the torch model's weights are compressed: give it as it was before nncf.compress_weights"
        raise ActsparseError(msg)
    tensors = [*torch_model.parameters(), *torch_model.buffers()]
    twin = copy.deepcopy(torch_model, {id(tensor): tensor for tensor in tensors})
    TorchBackend(twin).replace_masks({})
    return twin


def _build(config: PretrainedConfig) -> nn.Module:
    try:
        # A copy, as transformers notes in the configuration what it was used for.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        msg = f"no torch model can be made of this configuration: {shorten_message(error)}"
        raise ActsparseError(msg) from error


def _fill(name: str, module: nn.Module, stored: StoredParameters) -> None:
    for kind, parameter in [*module.named_parameters(recurse=False)]:
        values = stored.read(name, module, kind)
        if values is None:
            if parameter.ndim > 1:
                msg = f"the OpenVINO model does not show the weights of {name}.{kind}, of shape {[*parameter.shape]}"
                raise ActsparseError(msg)
            # OpenVINO leaves out what multiplies by 1 and adds 0, which new norms do; and the check sees all else.
            values = nn.Parameter(parameter.detach().float(), requires_grad=False)
        module.register_parameter(kind, values)
    for kind, buffer in [*module.named_buffers(recurse=False)]:
        values = stored.read(name, module, kind)
        tensor = buffer if values is None else values.data
        module._buffers[kind] = tensor.float() if tensor.is_floating_point() else tensor


def _scale_function(twin: nn.Module, node: str, scale: torch.Tensor) -> None:
    name = module_of_node(node)
    modules = dict(twin.named_modules())
    if name is None or name not in modules:
        msg = f"AWQ scales what {node} computes, which is no module of {type(twin).__name__}: compress without AWQ"
        raise ActsparseError(msg)
    owner, _, attribute = name.rpartition(".")
    setattr(modules[owner], attribute, ScaledActivation(modules[name], scale))

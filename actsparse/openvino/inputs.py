"""From a batch of the user's to the inputs of an OpenVINO model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
import torch

from actsparse.errors import ActsparseError


def make_inputs(model: ov.Model | ov.CompiledModel, batch: Any) -> dict[str, np.ndarray]:
    """
    Complete a model input: what a causal language model needs besides tokens is made from their shape.

    :param batch: A dict by input name, a tuple in the order of the inputs, or the first input alone.
    :raises ActsparseError: If an input is not known, is missing, or has other dimensions.
    """
    wanted = {_name(port): port for port in model.inputs}
    given = _by_name(list(wanted), batch)
    if "attention_mask" not in wanted and np.asarray(given.get("attention_mask", 1)).all():
        given.pop("attention_mask", None)
    unknown = next((name for name in given if name not in wanted), None)
    if unknown is not None:
        msg = f"the OpenVINO model has no input {unknown}; its inputs: {', '.join(wanted)}"
        raise ActsparseError(msg)
    arrays = {name: _array(wanted[name], value) for name, value in given.items()}
    tokens = next((arrays[name] for name in ("input_ids", "inputs_embeds") if name in arrays), None)
    for name, port in wanted.items():
        if name in arrays:
            continue
        made = None if tokens is None else _make_input(name, port, *tokens.shape[:2])
        if made is None:
            msg = f"the batch has no {name}, an input of the OpenVINO model; its inputs: {', '.join(wanted)}"
            raise ActsparseError(msg)
        arrays[name] = made
    return arrays


def _by_name(names: list[str], batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    values = batch if isinstance(batch, tuple) else (batch,)
    if len(values) > len(names):
        msg = f"the batch has {len(values)} entries, the OpenVINO model {len(names)} inputs: {', '.join(names)}"
        raise ActsparseError(msg)
    if len(values) == 1 and "input_ids" in names:
        return {"input_ids": values[0]}
    return dict(zip(names, values, strict=False))


def _array(port: Any, value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()
    array = np.asarray(value)
    shape = port.get_partial_shape()
    if array.dtype.kind not in "biuf" or not shape.compatible(ov.PartialShape(list(array.shape))):
        msg = f"{_name(port)} is {array.dtype} of shape {array.shape}; the OpenVINO model takes {shape}"
        raise ActsparseError(msg)
    return array.astype(port.get_element_type().to_dtype(), copy=False)


def _make_input(name: str, port: Any, batch_size: int, length: int) -> np.ndarray | None:
    kind = port.get_element_type().to_dtype()
    if name == "attention_mask":
        return np.ones((batch_size, length), kind)
    if name == "position_ids":
        # As transformers' own models count: one position after the other, whatever the attention mask.
        return np.broadcast_to(np.arange(length, dtype=kind), (batch_size, length)).copy()
    if name == "beam_idx":
        return np.arange(batch_size, dtype=kind)
    if name == "token_type_ids":
        return np.zeros((batch_size, length), kind)
    if name.startswith(("past_key_values", "present")):
        sizes = [-1 if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
        sizes[0] = batch_size if sizes[0] < 0 else sizes[0]
        return np.zeros([max(size, 0) for size in sizes], kind)
    return None


def _name(port: Any) -> str:
    return port.get_any_name() if port.get_names() else port.get_node().get_friendly_name()

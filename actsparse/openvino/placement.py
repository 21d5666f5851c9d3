"""The masks of an OpenVINO model by layer: read them, place them, and note in the model what they are."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import openvino as ov
import torch

from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear
from actsparse.openvino.masks import (
    find_masks,
    group_by_source,
    insert_mask,
    insert_row_mask,
    remove_masks,
    require_sequences,
)
from actsparse.stand_in import NOTHING, StandIn
from actsparse.thresholds import LayerRecord

# Where a model keeps what it says of its masks besides their thresholds; it is saved with it.
_PATH = ["actsparse", "masks"]


@dataclass(frozen=True)
class LayerMask:
    """
    What masks one layer.

    :param threshold: |x| <= threshold becomes 0; shape [] or [channels].
    :param tokens: Which tokens are masked, ``all`` or ``decode``.
    :param record: What else is known, or None: a model converted by others says nothing.
    :param is_of_rows: Whether what the layer's output is multiplied by is masked, and not its input.
    :param stand_in: What stands in for what is left out.
    """

    threshold: np.ndarray
    tokens: str
    record: LayerRecord | None
    is_of_rows: bool = False
    stand_in: StandIn = NOTHING

    @classmethod
    def of(cls, threshold: torch.Tensor, record: LayerRecord, stand_in: StandIn = NOTHING) -> "LayerMask":
        """
        Make the mask that a record describes.

        :param threshold: Its threshold, of torch.
        :param record: The record.
        :param stand_in: What stands in for what is left out, of torch.
        :return: The mask.
        """
        values = threshold.detach().float().cpu().numpy()
        return cls(values, record.tokens, record, bool(record.gate_function), stand_in.to("cpu"))


def masks_of(model: ov.Model) -> dict[str, LayerMask]:
    """
    List the masks of a model by layer.

    :param model: An OpenVINO model.
    :return: The masks by layer name, in topological order.
    """
    masks = {linear.name: mask for mask in find_masks(model) for linear in mask.linears}
    records = _read_records(model) if masks else {}
    found = ((name, masks[calls[0].name]) for name, calls in named_calls(model).items() if calls[0].name in masks)
    return {
        name: LayerMask(mask.threshold, mask.tokens, records.get(name), mask.is_of_rows, mask.stand_in)
        for name, mask in found
    }


def replace_masks(model: ov.Model, masks: Mapping[str, LayerMask]) -> None:
    """
    Mask layers, with one mask for all that read the same output up to the same threshold.

    Save the model with `compress_to_fp16=False`, as optimum-intel does: otherwise OpenVINO rounds thresholds to fp16.

    :param model: A model; changed in place. Other masks that it has are removed.
    :param masks: The masks by layer name; what masks nothing is left out.
    """
    remove_masks(model)
    masks = {name: mask for name, mask in masks.items() if np.any(mask.threshold > -np.inf)}
    calls = named_calls(model)
    of_inputs = {name: mask for name, mask in masks.items() if not mask.is_of_rows}
    for name in masks.keys() - of_inputs.keys():
        for call in calls[name]:
            insert_row_mask(call, masks[name].threshold, masks[name].tokens)
    for site in group_by_source([call for name in of_inputs for call in calls[name]]):
        for mask, linears in _group_by_mask(site, of_inputs, calls):
            insert_mask(linears, mask.threshold, mask.tokens, mask.stand_in)
    if any(mask.tokens == "decode" for mask in masks.values()):
        require_sequences(model)
    records = {name: asdict(mask.record) for name, mask in masks.items() if mask.record}
    model.set_rt_info(json.dumps(records), _PATH)


def read_targets(model: ov.Model) -> dict[str, float]:
    """
    Read the target sparsities that a model records.

    :param model: An OpenVINO model.
    :return: Target sparsity by layer name; nothing where the model does not say.
    """
    return {name: record.target_sparsity for name, record in _read_records(model).items()}


def _group_by_mask(
    site: list[Linear], masks: Mapping[str, LayerMask], calls: dict[str, tuple[Linear, ...]]
) -> list[tuple[LayerMask, list[Linear]]]:
    names = {call.name: name for name in masks for call in calls[name]}
    groups: dict[tuple[str, bytes, StandIn], tuple[LayerMask, list[Linear]]] = {}
    for linear in site:
        mask = masks[names[linear.name]]
        key = (mask.tokens, mask.threshold.tobytes(), mask.stand_in)
        groups.setdefault(key, (mask, []))[1].append(linear)
    return list(groups.values())


def _read_records(model: ov.Model) -> dict[str, LayerRecord]:
    if not model.has_rt_info(_PATH):
        return {}
    try:
        records = json.loads(str(model.get_rt_info(_PATH).value))
        return {name: LayerRecord(**{**record, "roles": tuple(record["roles"])}) for name, record in records.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}

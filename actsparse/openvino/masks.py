"""The masks of an OpenVINO model by layer: read them, place them, and note in the model what they are."""

import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import openvino as ov
import torch

from actsparse.mask import Compensation, Mask
from actsparse.openvino.graph_masks import (
    GraphMask,
    find_masks,
    group_by_source,
    insert_mask,
    insert_row_mask,
    remove_masks,
    require_sequences,
)
from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear

# Where a model keeps what it says of its masks besides their thresholds; it is saved with it.
_PATH = ["actsparse", "masks"]
# What an algorithm that chooses has tried: once, as it is the same for all masks of a call.
_SELECTION = ["actsparse", "selection"]


def masks_of(model: ov.Model) -> dict[str, Mask]:
    """List the masks of a model by layer."""
    masks = {linear.name: mask for mask in find_masks(model) for linear in mask.linears}
    records = read_records(model) if masks else {}
    found = ((name, masks[calls[0].name]) for name, calls in named_calls(model).items() if calls[0].name in masks)
    return {name: _describe(mask, records.get(name)) for name, mask in found}


def replace_masks(model: ov.Model, masks: Mapping[str, Mask]) -> None:
    """
    Mask layers, with one mask for all that read the same output up to the same threshold.

    Save the model with `compress_to_fp16=False`, as optimum-intel does: otherwise OpenVINO rounds thresholds to fp16.

    :param model: A model; changed in place. Other masks that it has are removed.
    :param masks: The masks by layer name; what masks nothing is left out.
    """
    remove_masks(model)
    masks = {name: mask for name, mask in masks.items() if bool((mask.threshold > -torch.inf).any())}
    calls = named_calls(model)
    of_inputs = {name: mask for name, mask in masks.items() if not mask.is_of_rows}
    for name in masks.keys() - of_inputs.keys():
        for call in calls[name]:
            insert_row_mask(call, _to_array(masks[name]), masks[name].tokens)
    for site in group_by_source([call for name in of_inputs for call in calls[name]]):
        for mask, linears in _group_by_mask(site, of_inputs, calls):
            insert_mask(linears, _to_array(mask), mask.tokens, mask.compensation.to("cpu"))
    if any(mask.tokens == "decode" for mask in masks.values()):
        require_sequences(model)
    records = {name: mask.to_record() for name, mask in masks.items() if mask.target_sparsity is not None}
    model.set_rt_info(json.dumps(records), _PATH)
    selection = next((mask.selection for mask in masks.values() if mask.selection), None)
    if selection or model.has_rt_info(_SELECTION):
        model.set_rt_info(json.dumps(selection), _SELECTION)


def _group_by_mask(
    site: list[Linear], masks: Mapping[str, Mask], calls: dict[str, tuple[Linear, ...]]
) -> list[tuple[Mask, list[Linear]]]:
    names = {call.name: name for name in masks for call in calls[name]}
    groups: dict[tuple[str, bytes, Compensation], tuple[Mask, list[Linear]]] = {}
    for linear in site:
        mask = masks[names[linear.name]]
        key = (mask.tokens, _to_array(mask).tobytes(), mask.compensation)
        groups.setdefault(key, (mask, []))[1].append(linear)
    return list(groups.values())


def _to_array(mask: Mask) -> np.ndarray:
    return mask.threshold.detach().float().cpu().numpy()


def _describe(found: GraphMask, record: Mask | None) -> Mask:
    """Join what the graph says of a mask and, unless it was converted by others, what the model records of it."""
    known = record or Mask(torch.empty(0))
    return replace(
        known,
        threshold=torch.from_numpy(found.threshold.copy()),
        tokens=found.tokens,
        is_of_rows=found.is_of_rows,
        compensation=found.compensation,
    )


def read_records(model: ov.Model) -> dict[str, Mask]:
    """Read what a model notes of its masks, by layer, without their tensors; nothing where it does not say."""
    if not model.has_rt_info(_PATH):
        return {}
    try:
        records = json.loads(str(model.get_rt_info(_PATH).value))
        selection = json.loads(str(model.get_rt_info(_SELECTION).value)) if model.has_rt_info(_SELECTION) else None
        masks = {name: Mask.from_record(torch.empty(0), record) for name, record in records.items()}
        return {name: mask.with_selection(selection) for name, mask in masks.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}

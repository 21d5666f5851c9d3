"""Sparsify an OpenVINO model: find the sites on a copy, calibrate on a copy, then insert the masks."""

from collections.abc import Mapping
from typing import Any

import nncf
import openvino as ov
import torch

from actsparse.algorithms import LayerSize
from actsparse.calibration import CalibrationBatches, SiteEstimates, make_estimates
from actsparse.errors import ActsparseError, ScopeError
from actsparse.openvino.calibration import run_intercepted
from actsparse.openvino.layers import find_block_layers, find_openvino_layers, named_calls
from actsparse.openvino.masks import remove_masks
from actsparse.openvino.measurements import OpenVinoMeasurements
from actsparse.openvino.placement import LayerMask, masks_of, replace_masks
from actsparse.scopes import Layer, Site, TargetScope, group_sites, match_targets
from actsparse.scopes.matching import Target
from actsparse.sparsify import Settings
from actsparse.thresholds import LayerRecord


def sparsify_openvino(
    model: ov.Model, dataset: Any, targets: Any, ignored_scope: nncf.IgnoredScope | None, settings: Settings
) -> None:
    """
    Mask an OpenVINO model, as `sparsify_activations` says.

    :param model: The model; changed in place.
    :param dataset: Calibration data.
    :param targets: Target sparsity for each scope, or one number.
    :param ignored_scope: Layers to leave out.
    :param settings: The rest.
    :raises ScopeError: As `sparsify_activations`.
    :raises DatasetError: As `sparsify_activations`.
    """
    if settings.skip_first:
        msg = "the masks of an OpenVINO model cannot let the first tokens pass: leave skip_first out"
        raise ActsparseError(msg)
    if settings.algorithm.masks_rows or settings.algorithm.stand_in:
        msg = (
            f"{settings.algorithm.name} masks rows or needs a stand-in, which are found on the torch model: calibrate "
            "that, save_thresholds, and load_thresholds here, or deploy_model"
        )
        raise ActsparseError(msg)
    batches = CalibrationBatches.of(dataset)
    bare = model.clone()
    remove_masks(bare)
    layers, target_by_layer = _resolve(bare, targets, ignored_scope)
    sites = group_sites(layer for layer in layers if layer.name in target_by_layer)
    kept = {n: m for n, m in masks_of(model).items() if settings.keep_existing and n not in target_by_layer}
    replace_masks(bare, kept)
    sparsity, estimates = _calibrate(bare, batches, sites, target_by_layer, settings)
    made = {
        layer.name: LayerMask.of(
            estimates.threshold(site.name, target),
            LayerRecord(target, settings.tokens, settings.algorithm.name, site.name, layer.roles),
        )
        for site in sites
        for layer in site.layers
        for target in (sparsity[layer.name],)
    }
    replace_masks(model, {**kept, **made})


def _resolve(bare: ov.Model, targets: Any, ignored: Any) -> tuple[list[Layer], dict[str, Target]]:
    graph, layers = find_openvino_layers(bare)
    if not layers:
        msg = "the OpenVINO model has no Linear layers to sparsify"
        raise ScopeError(msg)
    if not isinstance(targets, Mapping):
        names = [layer.name for layer in find_block_layers(graph, layers)]
        targets = {TargetScope(names=names): targets}
    return layers, match_targets(targets, ignored, graph, layers)


def _calibrate(
    bare: ov.Model,
    batches: CalibrationBatches,
    sites: list[Site],
    targets: dict[str, Target],
    settings: Settings,
) -> tuple[Mapping[str, float], SiteEstimates]:
    """
    Run the data through a copy of the model that masks itself while it is calibrated.

    :param bare: The copy, without the masks that are to be found; spoilt by this.
    :param batches: The data.
    :param sites: The sites to mask.
    :param targets: Target by layer.
    :param settings: How the call was made.
    :return: The sparsity of each layer, and the estimates.
    """
    sizes = {
        name: LayerSize(call.in_features, call.out_features, float(call.weight_bytes))
        for name, (call, *_) in named_calls(bare).items()
    }

    def measure(data: list[Any]) -> OpenVinoMeasurements:
        return OpenVinoMeasurements(bare, data, sites, settings.known)

    plan, data, estimates = make_estimates(settings.algorithm, sites, targets, sizes, batches, measure)

    def intercept(site: str, x: torch.Tensor, wanted: list[float]) -> list[torch.Tensor]:
        estimates.update(site, x)
        return [estimates.mask_batch(site, x, target) for target in wanted]

    run_intercepted(bare, data, sites, plan.sparsity, intercept, total=batches.length, description="calibrating")
    estimates.require_all_seen()
    return plan.sparsity, estimates

"""Sparsify an OpenVINO model: find the sites on a copy, calibrate on a copy, then insert the masks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch

from actsparse.algorithms import Algorithm
from actsparse.calibration import CalibrationBatches, SiteEstimates, run_each
from actsparse.errors import ScopeError
from actsparse.openvino.layers import find_block_layers, find_openvino_layers, named_calls
from actsparse.openvino.linear import Linear
from actsparse.openvino.masks import group_by_source, remove_masks
from actsparse.openvino.placement import LayerMask, masks_of, replace_masks
from actsparse.openvino.runner import Runner
from actsparse.openvino.tap import insert_tap
from actsparse.scopes import Layer, Site, TargetScope, group_sites, match_targets
from actsparse.thresholds import LayerRecord


@dataclass(frozen=True)
class Settings:
    """
    How `sparsify_activations` was called.

    :param algorithm: The algorithm.
    :param tokens: ``all`` or ``decode``.
    :param keep_existing: Whether masks stay on the layers that no scope matches.
    """

    algorithm: Algorithm
    tokens: str
    keep_existing: bool


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
    batches = CalibrationBatches(dataset)
    bare = model.clone()
    remove_masks(bare)
    layers, target_by_layer = _resolve(bare, targets, ignored_scope)
    sites = group_sites(layer for layer in layers if layer.name in target_by_layer)
    kept = {n: m for n, m in masks_of(model).items() if settings.keep_existing and n not in target_by_layer}
    replace_masks(bare, kept)
    estimates = _calibrate(bare, batches, sites, target_by_layer, settings.algorithm)
    made = {
        layer.name: LayerMask(
            estimates.threshold(site.name, target).numpy(),
            settings.tokens,
            LayerRecord(target, settings.tokens, settings.algorithm.name, site.name, layer.roles),
        )
        for site in sites
        for layer in site.layers
        for target in (target_by_layer[layer.name],)
    }
    replace_masks(model, {**kept, **made})


def _resolve(bare: ov.Model, targets: Any, ignored: Any) -> tuple[list[Layer], dict[str, float]]:
    graph, layers = find_openvino_layers(bare)
    if not layers:
        msg = "the OpenVINO model has no Linear layers to sparsify"
        raise ScopeError(msg)
    if not isinstance(targets, Mapping):
        names = [layer.name for layer in find_block_layers(graph, layers)]
        targets = {TargetScope(names=names): targets}
    matched = match_targets(targets, ignored, graph, layers)
    return layers, {name: target.sparsity for name, target in matched.items()}


def _calibrate(
    bare: ov.Model,
    batches: CalibrationBatches,
    sites: list[Site],
    targets: dict[str, float],
    algorithm: Algorithm,
) -> SiteEstimates:
    """
    Run the data through a copy of the model that masks itself while it is calibrated.

    :param bare: The copy, without the masks that are to be found; spoilt by this.
    :param batches: The data.
    :param sites: The sites to mask.
    :param targets: Target sparsity by layer.
    :param algorithm: The algorithm.
    :return: The estimates.
    """
    estimates = SiteEstimates({s.name: {targets[x.name] for x in s.layers} for s in sites}, algorithm, {})
    calls = named_calls(bare)
    failures: list[BaseException] = []
    ends: list[ov.Node] = []
    for site in sites:
        for linears in group_by_source([call for layer in site.layers for call in calls[layer.name]]):
            ends.append(_tap(site, linears, calls, targets, estimates, failures))
    # What no mask depends on, the head above all, is not computed.
    results = [ops.result(end) for end in ends]
    part = ov.Model(results, bare.get_sinks(), bare.get_parameters(), "calibration")  # pyright: ignore[reportGeneralTypeIssues]
    runner = Runner(part)

    def run(batch: Any) -> None:
        runner.run(batch)
        if failures:
            raise failures[0]

    run_each(run, batches, total=batches.length, description="calibrating")
    estimates.require_all_seen()
    return estimates


def _tap(
    site: Site,
    linears: list[Linear],
    calls: dict[str, tuple[Linear, ...]],
    targets: dict[str, float],
    estimates: SiteEstimates,
    failures: list[BaseException],
) -> ov.Node:
    by_call = {call.name: targets[layer.name] for layer in site.layers for call in calls[layer.name]}
    wanted = sorted({by_call[linear.name] for linear in linears})

    def intercept(x: torch.Tensor) -> list[torch.Tensor]:
        estimates.update(site.name, x)
        return [estimates.mask_batch(site.name, x, target) for target in wanted]

    outputs = insert_tap(linears[0].source, intercept, len(wanted), failures)
    for linear in linears:
        tapped = outputs[wanted.index(by_call[linear.name])]
        linear.node.input(linear.input_port).replace_source_output(tapped)
    # One entry of the tensor is enough to have the tap run.
    flat = ops.reshape(outputs[0], np.array([-1]), special_zero=False)
    return ops.gather(flat, np.array([0]), np.array(0))

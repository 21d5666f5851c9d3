"""The call: check, find the layers, match scopes, group sites, decide, calibrate, place."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import nncf
import torch
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper

from actsparse.algorithms import BIAS, ZEROS, Algorithm, get_algorithm
from actsparse.backend import Backend, backend_of
from actsparse.calibration import Calibration, CalibrationBatches, Decision, Loss, Settings, decide
from actsparse.errors import ActsparseError, DatasetError, ScopeError
from actsparse.mask import NO_COMPENSATION, TOKENS, Compensation, Mask
from actsparse.scopes import Layer, Layers, Site, group_sites, match_targets
from actsparse.scopes.matching import Target, describe_scope, validate_targets
from actsparse.scopes.roles import is_alone
from actsparse.scopes.zeros import describe_functions
from actsparse.texts.bos import warn_of_missing_bos

_logger = logging.getLogger(__name__)


def sparsify_activations(
    model: Any,
    dataset: nncf.Dataset | Iterable[Any] | None = None,
    target_sparsity_by_scope: Mapping[Any, float] | float | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    *,
    algorithm: str | Algorithm = "magnitude",
    tokens: str = "all",
    keep_existing: bool = False,
    loss: Loss | None = None,
    skip_first: int = 0,
    tokenizer: Any = None,
) -> Any:
    """
    Make Linear layers ignore input entries of small magnitude, with thresholds calibrated on data.

    The first four parameters are those of `nncf.experimental.torch.sparsify_activations.sparsify_activations`. The
    model may have been compressed by `nncf.compress_weights`, or may be compressed afterwards. A call that fails leaves
    the model as it was.

    Names and patterns of an OpenVINO model are those of its nodes and of the torch modules that they come from.

    :param model: Any torch module, `openvino.Model` or optimum-intel `OVModelForCausalLM`; changed in place.
    :param dataset: Calibration data: an `nncf.Dataset`, or any iterable of model inputs (tensor, tuple or dict). The
        algorithm ``zeros`` takes none.
    :param target_sparsity_by_scope: Target sparsity in [0, 1] for each `TargetScope`, or one number for every Linear
        layer of the model's blocks. For ``zeros`` it says where alone, with 1.0 for all zeros that there are; nothing
        is everywhere.
    :param ignored_scope: Layers to leave out.
    :param algorithm: How thresholds are found: ``magnitude`` (the quantile over all calibration tokens), ``auto`` (the
        best of several), ``zeros`` (what ReLU and its kin make zero, exactly that: the model's outputs stay what they
        are), ``nncf`` (NNCF's moving average), another name of `actsparse.algorithms.ALGORITHMS`, or
        SCORE+ALLOCATION, such as ``layer-fisher+global``; or an `Algorithm`, such as
        ``Algorithm("magnitude", "attribution", rows=True)``. All but ``magnitude`` and ``nncf`` run the data several
        times and keep it in memory for that; an allocation other than uniform gives layers different sparsities that
        reach a scope's target together.
    :param tokens: ``all`` masks every token, ``decode`` only forwards of a single new token.
    :param keep_existing: Whether masks from an earlier call stay on the layers that this call does not match. Without
        it, this call's masks replace all earlier ones.
    :param loss: For scores that need gradients: a function of the model's output and its input. By default the model's
        own loss where batches have labels, or the next-token cross entropy of a causal language model.
    :param skip_first: How many tokens at the start of each sequence pass unmasked, as attention sinks: of each forward
        of several tokens, so that they are those of a prompt. Torch models only.
    :param tokenizer: The model's tokenizer, if there is one, to check the dataset with: a warning says where it begins
        texts with BOS and the dataset does not.
    :return: The same model, masked.
    :raises ScopeError: If a scope matches nothing, two scopes match one layer, or a target is not in [0, 1].
    :raises DatasetError: If the dataset is empty, does not fit the model, or gives NaN or infinite activations.
    :raises ActsparseError: If the algorithm or `tokens` is unknown, or the model does not take what is asked for.
    """
    wanted = get_algorithm(algorithm)
    targets: Any = _complete(dataset, target_sparsity_by_scope, wanted)
    validate_targets(targets, ignored_scope)
    if tokens not in TOKENS:
        msg = f"tokens must be one of {', '.join(TOKENS)}, not {tokens!r}"
        raise ActsparseError(msg)
    if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
        msg = f"skip_first is {skip_first!r}; it must be a whole number of tokens, 0 or more"
        raise ActsparseError(msg)
    settings = Settings(wanted, tokens, keep_existing, loss, skip_first)
    if tokenizer is not None and dataset is not None:
        dataset = CalibrationBatches(dataset)
        warn_of_missing_bos(tokenizer, dataset.first)
    if isinstance(model, GraphModelWrapper):  # what `nncf.torch.wrap_model` returns, which NNCF's call takes too
        model = model.model
    calibrate(model, dataset, targets, ignored_scope, settings)
    return model


def calibrate(
    model: Any, dataset: Any, targets: Any, ignored_scope: nncf.IgnoredScope | None, settings: Settings
) -> Calibration:
    """
    Mask a model, as `sparsify_activations` says, and tell what it took.

    :param model: The model; changed in place.
    :param dataset: Calibration data; None for an algorithm that takes none.
    :param targets: Target sparsity for each scope, or one number.
    :param ignored_scope: Layers to leave out.
    :param settings: The rest.
    :return: What it took.
    :raises ScopeError: As `sparsify_activations`.
    :raises DatasetError: As `sparsify_activations`.
    """
    backend, algorithm = backend_of(model), settings.algorithm
    with backend.editing():
        backend.check(settings)
        # What is zero by itself takes no data.
        batches = CalibrationBatches.of(dataset) if algorithm.needs_data or dataset is not None else None
        example = None if batches is None else batches.first
        found = backend.layers(example)
        by_layer = match_targets(targets, ignored_scope, found)
        masks = backend.masks()
        kept = {name: mask for name, mask in masks.items() if settings.keep_existing and name not in by_layer}
        if batches is None or not algorithm.needs_data:
            backend.replace_masks(
                {**kept, **_make_masks_of_zeros(backend, example, found, targets, by_layer, settings)}
            )
            return Calibration(0, 0)
        matched = [layer for layer in found.all if layer.name in by_layer]
        gates = backend.gate_functions(example, matched, found.all) if algorithm.rows else {}
        layouts = _lay_out(matched, gates, algorithm)
        with backend.calibrating([*layouts.values()], kept, settings) as run:
            decision = decide(algorithm, layouts, by_layer, backend.sizes(), batches, run.measure)
            count = max(run.calibrate(decision, batches.share_length), 1)
            decision.estimates.add_up()
            decision.estimates.require_all_seen()
            made = _make_masks(decision, by_layer, settings)
            if algorithm.compensation == BIAS:
                made = _add_biases(made, run.find_biases(decision, made))
        backend.replace_masks({**kept, **made})
    return Calibration(run.passes.forwards / count, run.passes.backwards / count, decision.selection)


def remove_sparsifiers(model: Any) -> Any:
    """
    Take every mask off a model, which is then what it was before.

    :param model: A torch module, `openvino.Model` or optimum-intel model, masked or not.
    :return: The same model.
    """
    backend_of(model).replace_masks({})
    return model


def _complete(dataset: Any, targets: Any, algorithm: Algorithm) -> Any:
    """Check what was left out."""
    if algorithm.needs_data:
        if dataset is None:
            msg = f"{algorithm.name} needs a calibration dataset; {ZEROS} alone takes none"
            raise DatasetError(msg)
        if targets is None:
            msg = "target_sparsity_by_scope is missing: give one number for all block layers, or one for each scope"
            raise ScopeError(msg)
        return targets
    return 1.0 if targets is None else targets


def _make_masks_of_zeros(
    backend: Backend, example: Any, found: Layers, targets: Any, by_layer: Mapping[str, Target], settings: Settings
) -> dict[str, Mask]:
    """Mask what is zero by itself, and nothing else: all thresholds are zero."""
    if any(target.sparsity != 1 for target in by_layer.values()):
        msg = f"{ZEROS} leaves out all that is zero, and nothing else: targets are 1.0; ignored_scope leaves layers out"
        raise ScopeError(msg)
    matched = [layer for layer in found.all if layer.name in by_layer]
    zeroed = [layer for layer in matched if layer.activation.zeroed_by]
    if not zeroed:
        functions = describe_functions(layer.activation for layer in matched)
        msg = f"no activations are zero by themselves: the activation functions of these networks are {functions}"
        raise ScopeError(msg)
    missing = {target.scope for target in by_layer.values()} - {by_layer[layer.name].scope for layer in zeroed}
    if missing:
        scope = describe_scope([*targets][min(missing)])
        msg = f"{scope} has no layer whose input, or whose gate, is zero by itself"
        raise ScopeError(msg)
    ups = [layer for layer in zeroed if is_alone("ffn.up", layer.roles)]
    gates: Mapping[str, str] = {}
    if settings.algorithm.rows and ups:
        try:
            gates = backend.gate_functions(example, ups, found.all)
        except ScopeError as error:
            # Their inputs have zeros all the same.
            _logger.warning("rows of up projections are not masked: %s", error)
    sites = group_sites([layer for layer in zeroed if layer not in ups or layer.name in gates], gates)
    zero = torch.tensor(0.0)
    return {layer.name: _make_mask(zero, 1.0, site, layer, settings) for site in sites for layer in site.layers}


def _lay_out(
    matched: Sequence[Layer], gate_functions: Mapping[str, str], algorithm: Algorithm
) -> dict[bool, list[Site]]:
    """Group layers into the sites that the algorithms to try need, by whether they mask rows."""
    tried = algorithm.candidates or (algorithm,)
    wanted = {candidate.rows and bool(gate_functions) for candidate in tried}
    return {has_rows: group_sites(matched, gate_functions if has_rows else {}) for has_rows in sorted(wanted)}


def _add_biases(masks: Mapping[str, Mask], biases: Mapping[str, torch.Tensor]) -> dict[str, Mask]:
    compensations = {site: Compensation(bias=bias) for site, bias in biases.items()}
    return {
        name: replace(
            mask, compensation=mask.compensation if mask.is_of_rows else compensations.get(mask.site, mask.compensation)
        )
        for name, mask in masks.items()
    }


def _make_masks(decision: Decision, targets: Mapping[str, Target], settings: Settings) -> dict[str, Mask]:
    plan = decision.plan
    selection = decision.selection.to_dict() if decision.selection else None
    return {
        layer.name: _make_mask(
            decision.estimates.threshold(site.name, plan.zeros[layer.name]),
            targets[layer.name].sparsity,
            site,
            layer,
            settings,
            allocated_sparsity=plan.sparsity[layer.name],
            compensation=plan.compensations.get(site.name, NO_COMPENSATION),
            selection=selection,
        )
        for site in decision.sites
        for layer in site.layers
    }


def _make_mask(
    threshold: torch.Tensor, target: float, site: Site, layer: Layer, settings: Settings, **decided: Any
) -> Mask:
    return Mask(
        threshold,
        target,
        tokens=settings.tokens,
        algorithm=settings.algorithm.name,
        site=site.name,
        roles=layer.roles,
        is_of_rows=bool(site.gate_function),
        gate_function=site.gate_function,
        skip_first=settings.skip_first,
        **decided,
    )

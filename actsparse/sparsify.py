"""The call: validate, find the sites, calibrate, insert."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import nncf
import torch
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from torch import nn

from actsparse import distributed
from actsparse.algorithms import (
    NNCF_EMA,
    Algorithm,
    Known,
    LayerSize,
    Plan,
    Selection,
    Way,
    gather_parts,
    get_algorithm,
    select,
)
from actsparse.bos import warn_of_missing_bos
from actsparse.calibration import (
    CalibrationBatches,
    SiteEstimates,
    describe_batch,
    evaluation_mode,
    make_estimates,
    one_line,
    run_batches,
)
from actsparse.errors import ActsparseError, DatasetError, ScopeError
from actsparse.experts import has_split_experts, with_split_experts
from actsparse.insertion import (
    Passes,
    count_passes,
    insert_sparsifier,
    intercept_outputs,
    placed_sparsifiers,
    remove_sparsifier,
    suspend_sparsifiers,
)
from actsparse.measurements import Loss, TorchMeasurements
from actsparse.openvino.detect import find_openvino_model, forget_compiled
from actsparse.scopes import Layer, Site, find_layers, group_sites, match_targets
from actsparse.scopes.gates import find_gate_functions
from actsparse.scopes.graph import trace_graph
from actsparse.scopes.layers import block_layers, in_features, named_linears, out_features, weight_bytes
from actsparse.scopes.matching import Target, validate_targets
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsifier import TOKENS, ActivationSparsifier
from actsparse.stand_in import NOTHING


def sparsify_activations(
    model: Any,
    dataset: nncf.Dataset | Iterable[Any],
    target_sparsity_by_scope: Mapping[Any, float] | float,
    ignored_scope: nncf.IgnoredScope | None = None,
    *,
    algorithm: str = "magnitude",
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
    :param dataset: Calibration data: an `nncf.Dataset`, or any iterable of model inputs (tensor, tuple or dict).
    :param target_sparsity_by_scope: Target sparsity in [0, 1] for each `TargetScope`, or one number for every Linear
        layer of the model's blocks.
    :param ignored_scope: Layers to leave out.
    :param algorithm: How thresholds are found: ``magnitude`` (the quantile over all calibration tokens) or ``nncf``
        (NNCF's moving average), another name of `actsparse.algorithms.ALGORITHMS`, or SCORE+ALLOCATION, such as
        ``layer-fisher+global``. All but the first two run the data several times and keep it in memory for that; an
        allocation other than uniform gives layers different sparsities that reach a scope's target together.
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
    if isinstance(model, GraphModelWrapper):  # what `nncf.torch.wrap_model` returns, which NNCF's call takes too
        model = model.model
    chosen = _validate(target_sparsity_by_scope, ignored_scope, algorithm, tokens)
    if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
        msg = f"skip_first is {skip_first!r}; it must be a whole number of tokens, 0 or more"
        raise ActsparseError(msg)
    settings = Settings(chosen, tokens, keep_existing, loss, skip_first)
    if tokenizer is not None:
        dataset = CalibrationBatches(dataset)
        warn_of_missing_bos(tokenizer, dataset.first)
    if (openvino_model := find_openvino_model(model)) is not None:
        if distributed.count_processes() > 1:
            msg = "an OpenVINO model is calibrated by one process: calibrate the torch model, and load its thresholds"
            raise ActsparseError(msg)
        from actsparse.openvino.sparsify import sparsify_openvino

        sparsify_openvino(openvino_model, dataset, target_sparsity_by_scope, ignored_scope, settings)
        forget_compiled(model)
        return model
    sparsify_torch(model, dataset, target_sparsity_by_scope, ignored_scope, settings)
    return model


@dataclass(frozen=True)
class Settings:
    """
    How `sparsify_activations` was called.

    :param algorithm: The algorithm.
    :param tokens: ``all`` or ``decode``.
    :param keep_existing: Whether masks stay on the layers that no scope matches.
    :param loss: What gradients are of; None for the model's own.
    :param skip_first: How many tokens at the start of a forward pass unmasked.
    :param known: What calls before this one measured of the same model, sites and data; this one adds to it.
    """

    algorithm: Algorithm
    tokens: str = "all"
    keep_existing: bool = False
    loss: Loss | None = None
    skip_first: int = 0
    known: Known = field(default_factory=Known)


@dataclass(frozen=True)
class Calibration:
    """
    What a calibration of a torch model took and decided.

    :param forwards: How often the data went through the model, this process's share of it; tracing is not counted.
    :param backwards: How many of these runs went backwards too.
    :param selection: What was tried and chosen, by an algorithm that chooses.
    """

    forwards: float
    backwards: float
    selection: Selection | None = None

    def name_algorithm(self, name: str) -> str:
        """
        Name the algorithm for a report.

        :param name: What the caller said.
        :return: The same, with what was chosen where it chooses.
        """
        return f"{name}, which chose {self.selection.chosen}" if self.selection else name

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the calibration into what JSON can hold.

        :return: Its fields.
        """
        selection = {"selection": self.selection.to_dict()} if self.selection else {}
        return {"forwards": round(self.forwards, 3), "backwards": round(self.backwards, 3), **selection}


def sparsify_torch(model: Any, dataset: Any, targets: Any, ignored_scope: Any, settings: Settings) -> Calibration:
    """
    Mask a torch model, as `sparsify_activations` says.

    :param model: The model; changed in place.
    :param dataset: Calibration data.
    :param targets: Target sparsity for each scope, or one number.
    :param ignored_scope: Layers to leave out.
    :param settings: The rest.
    :return: What it took.
    :raises ScopeError: As `sparsify_activations`.
    :raises DatasetError: As `sparsify_activations`.
    """
    if settings.algorithm.allocation == NNCF_EMA and distributed.count_processes() > 1:
        msg = f"{NNCF_EMA} averages batch after batch, in their order: it cannot be shared among processes"
        raise ActsparseError(msg)
    _require_module(model)
    batches = CalibrationBatches.of(dataset)
    with with_split_experts(model):
        return _sparsify(model, batches, targets, ignored_scope, settings)


@dataclass(frozen=True)
class Layout:
    """
    One way to place masks: at inputs alone, or at gates where there are any.

    :param sites: What is masked.
    :param sparsifiers: The masks by layer name.
    :param places: The masks by the name of the module that they sit on.
    """

    sites: list[Site]
    sparsifiers: dict[str, ActivationSparsifier]
    places: dict[str, ActivationSparsifier]


def _sparsify(
    model: Any, batches: CalibrationBatches, targets: Any, ignored_scope: Any, settings: Settings
) -> Calibration:
    if has_split_experts(model) and (settings.tokens == "decode" or settings.skip_first):
        msg = "experts see single tokens of a prompt: tokens='decode' and skip_first cannot be told there"
        raise ActsparseError(msg)
    existing = dict(placed_sparsifiers(model))
    layers, by_layer = _resolve(model, batches.first, targets, ignored_scope, existing)
    matched = [layer for layer in layers if layer.name in by_layer]
    gate_functions = {}
    if settings.algorithm.masks_rows:
        with suspend_sparsifiers(existing.values()):
            gate_functions = find_gate_functions(model, batches.first, matched, layers)
    layouts = _lay_out(matched, by_layer, gate_functions, settings)
    placed = {place: mask for layout in layouts.values() for place, mask in layout.places.items()}
    replaced = {p: s for p, s in existing.items() if (s.rows_of or p) in by_layer or not settings.keep_existing}
    passes = Passes()
    try:
        for place, sparsifier in placed.items():
            insert_sparsifier(model, place, sparsifier)
        with suspend_sparsifiers(replaced.values()), count_passes(model, passes):
            layout, selection, count = _calibrate(model, batches, layouts, by_layer, settings)
    except BaseException:
        _restore(model, placed, existing)
        raise
    for place in (replaced.keys() | placed.keys()) - layout.places.keys():
        remove_sparsifier(model.get_submodule(place))
    return Calibration(passes.forwards / max(count, 1), passes.backwards / max(count, 1), selection)


def _lay_out(
    matched: list[Layer], targets: dict[str, Target], gate_functions: dict[str, str], settings: Settings
) -> dict[bool, Layout]:
    """Make the masks that the algorithms to try need, by whether they mask rows; they share all masks that they can."""
    wanted = {algorithm.masks_rows and bool(gate_functions) for algorithm in _candidates(settings.algorithm)}
    shared: dict[tuple[str, ...], ActivationSparsifier] = {}
    layouts = {}
    for has_rows in sorted(wanted):
        gates = gate_functions if has_rows else {}
        sites = group_sites(matched, gates)
        sparsifiers: dict[str, ActivationSparsifier] = {}
        for site in sites:
            for layer in site.layers:
                # An input mask of one layer is the same mask in both layouts, and so is the place that it sits on.
                key = (layer.name, site.name, site.gate_function)
                if key not in shared:
                    shared[key] = ActivationSparsifier(
                        targets[layer.name].sparsity,
                        tokens=settings.tokens,
                        roles=layer.roles,
                        site=site.name,
                        algorithm=settings.algorithm.name,
                        rows_of=layer.name if site.gate_function else "",
                        skip_first=settings.skip_first,
                    )
                sparsifiers[layer.name] = shared[key]
        layouts[has_rows] = Layout(sites, sparsifiers, {gates.get(name, name): s for name, s in sparsifiers.items()})
    return layouts


def _candidates(algorithm: Algorithm) -> tuple[Algorithm, ...]:
    return algorithm.candidates or (algorithm,)


def _validate(targets: Any, ignored_scope: Any, algorithm: str, tokens: str) -> Algorithm:
    validate_targets(targets, ignored_scope)
    if tokens not in TOKENS:
        msg = f"tokens must be one of {', '.join(TOKENS)}, not {tokens!r}"
        raise ActsparseError(msg)
    return get_algorithm(algorithm)


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        msg = f"the model must be a torch module or an OpenVINO model, not {type(model).__name__}"
        raise ActsparseError(msg)
    if next(named_linears(model), None) is None:
        msg = f"{type(model).__name__} has no Linear layers to sparsify"
        raise ScopeError(msg)


def _resolve(
    model: nn.Module, example: Any, targets: Any, ignored: Any, existing: dict[str, ActivationSparsifier]
) -> tuple[list[Layer], dict[str, Target]]:
    with suspend_sparsifiers(existing.values()), evaluation_mode(model):
        try:
            graph = trace_graph(model, example)
        except Exception as error:
            msg = f"the model cannot take batch 0 of the dataset ({describe_batch(example)}): {one_line(error)}"
            raise DatasetError(msg) from error
    layers = find_layers(model, graph)
    if not layers:
        msg = f"{type(model).__name__} calls none of its Linear layers on batch 0 of the dataset"
        raise ScopeError(msg)
    if not isinstance(targets, Mapping):
        names = [layer.name for layer in block_layers(model, layers)]
        targets = {TargetScope(names=names): targets}
    return layers, match_targets(targets, ignored, graph, layers)


def _calibrate(
    model: nn.Module,
    batches: CalibrationBatches,
    layouts: dict[bool, Layout],
    targets: dict[str, Target],
    settings: Settings,
) -> tuple[Layout, Selection | None, int]:
    """Find the thresholds; return the layout that they are of, what was chosen, and the number of batches."""
    layout, plan, data, estimates, selection = _plan(model, batches, layouts, targets, settings)
    sparsifiers = layout.sparsifiers
    for name, sparsifier in sparsifiers.items():
        sparsifier.target_sparsity = plan.sparsity[name]
        sparsifier.set_stand_in(plan.stand_ins.get(sparsifier.site, NOTHING))
        sparsifier.selection = selection.to_dict() if selection else None

    def calibrate_layer(name: str, x: torch.Tensor) -> torch.Tensor:
        sparsifier = sparsifiers[name]

        def mask(rest: torch.Tensor) -> torch.Tensor:
            # The layers of a site read one tensor: the first one called is named after the site and counts for all.
            if name == sparsifier.site:
                estimates.update(sparsifier.site, rest)
            return estimates.mask_batch(sparsifier.site, rest, plan.zeros[name])

        return sparsifier.mask_rest(x, mask)

    layers = [layer for site in layout.sites for layer in site.layers]
    reads_logits = len(block_layers(model, layers)) < len(layers)
    # The estimators mask during calibration; the masks themselves have no thresholds yet.
    with suspend_sparsifiers(sparsifiers.values()), intercept_outputs(sparsifiers, calibrate_layer):
        count = run_batches(
            model, data, total=batches.share_length, description="calibrating", reads_logits=reads_logits
        )
    estimates.add_up()
    estimates.require_all_seen()
    for name, sparsifier in sparsifiers.items():
        sparsifier.set_threshold(estimates.threshold(sparsifier.site, plan.zeros[name]))
    return layout, selection, count


def _plan(
    model: nn.Module,
    batches: CalibrationBatches,
    layouts: dict[bool, Layout],
    targets: dict[str, Target],
    settings: Settings,
) -> tuple[Layout, Plan, Iterable[Any], SiteEstimates, Selection | None]:
    def measure(layout: Layout, data: list[Any]) -> TorchMeasurements:
        return TorchMeasurements(model, data, layout.sites, layout.sparsifiers, settings.loss, settings.known)

    algorithm = settings.algorithm
    if not algorithm.candidates:
        (layout,) = layouts.values()
        sizes = _measure_sizes(model, layout.sites)
        return (
            layout,
            *make_estimates(algorithm, layout.sites, targets, sizes, batches, partial(measure, layout)),
            None,
        )
    kept = batches.keep()
    models = {rows: measure(layout, kept) for rows, layout in layouts.items()}
    scopes = {
        rows: gather_parts(layout.sites, targets, _measure_sizes(model, layout.sites))
        for rows, layout in layouts.items()
    }
    ways = []
    for candidate in algorithm.candidates:
        rows = candidate.masks_rows and True in layouts
        # Where no gate can be masked, rows are inputs as always.
        tried = candidate if rows == candidate.masks_rows else candidate.without_rows()
        if all(replace(tried, name=way.algorithm.name) != way.algorithm for way in ways):
            ways.append(Way(tried, scopes[rows], models[rows]))
    chosen, plan, selection = select(ways, algorithm.stand_in)
    layout = layouts[chosen.algorithm.masks_rows]
    estimates = SiteEstimates.of(plan, layout.sites, chosen.algorithm)
    return layout, plan, distributed.share(kept), estimates, selection


def _measure_sizes(model: nn.Module, sites: list[Site]) -> dict[str, LayerSize]:
    sizes = {}
    for site in sites:
        for layer in site.layers:
            module = model.get_submodule(layer.name)
            outputs = out_features(module)
            channels = outputs if site.gate_function else in_features(module)
            sizes[layer.name] = LayerSize(channels, outputs, float(weight_bytes(module)))
    return sizes


def _restore(model: nn.Module, inserted: Iterable[str], existing: dict[str, ActivationSparsifier]) -> None:
    for place in inserted:
        if place in existing:
            insert_sparsifier(model, place, existing[place])
        else:
            remove_sparsifier(model.get_submodule(place))

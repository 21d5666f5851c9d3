"""Torch models behind the door: masks on modules, placed by hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from actsparse.algorithms import HELD_OUT, take_part
from actsparse.calibration import Decision, Passes, Settings, describe_batch
from actsparse.errors import ActsparseError, DatasetError, ScopeError, one_line
from actsparse.mask import NO_COMPENSATION, Mask
from actsparse.scopes import Layer, Layers, LayerSize, Site
from actsparse.sparsity_report import ZeroCounter
from actsparse.torch.counting import TorchZeroCounter
from actsparse.torch.experts import has_split_experts, join_experts, with_split_experts
from actsparse.torch.gates import find_gate_functions
from actsparse.torch.insertion import (
    call_before,
    count_passes,
    insert_sparsifier,
    intercept_outputs,
    named_masks,
    placed_sparsifiers,
    remove_sparsifier,
    suspend_sparsifiers,
)
from actsparse.torch.layers import block_layers, describe_others, find_layers, measure_sizes, trace_graph
from actsparse.torch.measurements import Probe, TorchMeasurements, find_biases
from actsparse.torch.running import evaluation_mode, run_batches
from actsparse.torch.sparsifier import ActivationSparsifier
from actsparse.torch.wrappers import get_layer, named_linears, unwrap


class TorchBackend:
    """A torch model; see `actsparse.backend.Backend` for its methods."""

    name = "torch"

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module = unwrap(model)
        self._as_given = model

    def check(self, settings: Settings) -> None:
        """Refuse models without Linear layers, and what experts cannot tell."""
        if next(named_linears(self._model), None) is None:
            others = describe_others(self._model, ())
            msg = f"{type(self._model).__name__} has no Linear layers to sparsify{others and f': {others}'}"
            raise ScopeError(msg)
        if has_split_experts(self._model) and (settings.tokens == "decode" or settings.skip_first):
            msg = "experts see single tokens of a prompt: tokens='decode' and skip_first cannot be told there"
            raise ActsparseError(msg)

    def editing(self) -> AbstractContextManager[None]:
        """Split experts into layers, for good unless what is done inside fails."""
        return with_split_experts(self._model)

    def layers(self, example: Any) -> Layers:
        """Trace the model without its masks."""
        example = _find_example(self._model, example)
        called: set[str] = set()
        with self._without_masks(), evaluation_mode(self._model), ExitStack() as stack:
            for name, module in named_linears(self._model):
                stack.enter_context(call_before(module, partial(_note, called, name)))
            try:
                graph = trace_graph(self._model, example)
            except Exception as error:
                msg = f"the model cannot take batch 0 of the dataset ({describe_batch(example)}): {one_line(error)}"
                raise DatasetError(msg) from error
        layers = find_layers(self._model, graph)
        if not layers:
            others = describe_others(self._model, ())
            msg = f"{type(self._model).__name__} calls none of its Linear layers on batch 0 of the dataset; {others}"
            raise ScopeError(msg)
        bypassed = {layer.name for layer in layers} - called
        of_blocks = [layer for layer in block_layers(self._model, layers) if layer.name not in bypassed]
        return Layers(graph, layers, of_blocks, bypassed, describe_others(self._model, layers))

    def sizes(self) -> dict[str, LayerSize]:
        """Measure every Linear layer."""
        return measure_sizes(self._model)

    def gate_functions(self, example: Any, matched: Sequence[Layer], layers: Sequence[Layer]) -> dict[str, str]:
        """Run the model once, without its masks, to see which module reads what a gate computes."""
        with self._without_masks():
            return find_gate_functions(self._model, _find_example(self._model, example), matched, layers)

    def masks(self) -> dict[str, Mask]:
        """List the masks by layer."""
        return named_masks(self._model)

    def replace_masks(self, masks: Mapping[str, Mask]) -> None:
        """Put masks on modules; those that are there already stay the same objects."""
        places = {name: mask.gate_function or name for name, mask in masks.items()}
        modules = {name for name, _ in self._model.named_modules()}
        missing = next((place for place in places.values() if place not in modules), None)
        if missing is not None:
            msg = f"the model has no activation function {missing}"
            raise ActsparseError(msg)
        existing, before = dict(placed_sparsifiers(self._model)), self.masks()
        unchanged = {places[name] for name, mask in masks.items() if before.get(name) == mask} & existing.keys()
        made = {
            name: ActivationSparsifier.of(mask, name) for name, mask in masks.items() if places[name] not in unchanged
        }
        for place in existing.keys() - unchanged:
            remove_sparsifier(get_layer(self._model, place))
        for name, sparsifier in made.items():
            insert_sparsifier(self._model, places[name], sparsifier)
        if not masks:
            join_experts(self._model)

    @contextmanager
    def calibrating(
        self, layouts: Sequence[Sequence[Site]], kept: Mapping[str, Mask], settings: Settings
    ) -> Iterator["TorchCalibrationRun"]:
        """Put masks on all that is to be masked; they are taken off afterwards."""
        existing = dict(placed_sparsifiers(self._model))
        run = TorchCalibrationRun(self._model, settings)
        replaced = [mask for place, mask in existing.items() if (mask.rows_of or place) not in kept]
        placed = {place: mask for sites in layouts for place, mask in run.sparsifiers_of(sites).items()}
        try:
            for place, sparsifier in placed.items():
                insert_sparsifier(self._model, place, sparsifier)
            with suspend_sparsifiers(replaced), count_passes(self._model, run.passes):
                yield run
        finally:
            _restore(self._model, placed, existing)

    @contextmanager
    def count_zeros(self) -> Iterator[ZeroCounter]:
        """Watch what masks make of what they read."""
        counter = TorchZeroCounter(self._model)
        with counter.watch():
            yield counter

    def language_model(self) -> Callable[..., Any]:
        """Take the model as it is, compiled or not."""
        return self._as_given

    def _without_masks(self) -> AbstractContextManager[None]:
        return suspend_sparsifiers([sparsifier for _, sparsifier in placed_sparsifiers(self._model)])


class TorchCalibrationRun:
    """A torch model with masks that pass everything; see `actsparse.backend.CalibrationRun`."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.passes = Passes()
        self._model = model
        self._settings = settings
        # A mask of one layer is the same mask in every layout that places it alike.
        self._shared: dict[tuple[str, str, str], ActivationSparsifier] = {}

    def sparsifiers_of(self, sites: Iterable[Site]) -> dict[str, ActivationSparsifier]:
        """
        Make the masks of sites, or take those that were made before.

        :return: The masks by the module that they sit on.
        """
        places = {}
        for site in sites:
            for layer in site.layers:
                key = (layer.name, site.name, site.gate_function)
                if key not in self._shared:
                    self._shared[key] = ActivationSparsifier(
                        0.0,
                        site=site.name,
                        rows_of=layer.name if site.gate_function else "",
                        skip_first=self._settings.skip_first,
                    )
                places[site.gate_function or layer.name] = self._shared[key]
        return places

    def measure(self, sites: Sequence[Site], data: list[Any]) -> TorchMeasurements:
        """Measure with these masks."""
        masks = self._by_layer(sites)
        return TorchMeasurements(self._model, data, list(sites), masks, self._settings.loss, self._settings.cache)

    def calibrate(self, decision: Decision, total: int | None) -> int:
        """Let the estimators mask, and see what the layers read behind their masks."""
        plan, estimates = decision.plan, decision.estimates
        sparsifiers = self._by_layer(decision.sites)
        for sparsifier in sparsifiers.values():
            sparsifier.set_compensation(plan.compensations.get(sparsifier.site, NO_COMPENSATION))

        def calibrate_layer(name: str, x: torch.Tensor) -> torch.Tensor:
            sparsifier = sparsifiers[name]

            def mask(rest: torch.Tensor) -> torch.Tensor:
                # The layers of a site read one tensor: the first one called is named after the site and counts for all.
                if name == sparsifier.site:
                    estimates.update(sparsifier.site, rest)
                return estimates.mask_batch(sparsifier.site, rest, plan.zeros[name])

            return sparsifier.mask_rest(x, mask)

        layers = [layer for site in decision.sites for layer in site.layers]
        reads_logits = len(block_layers(self._model, layers)) < len(layers)
        # The estimators mask during calibration; the masks themselves have no thresholds yet.
        with suspend_sparsifiers(sparsifiers.values()), intercept_outputs(sparsifiers, calibrate_layer):
            return run_batches(
                self._model, decision.data, total=total, description="calibrating", reads_logits=reads_logits
            )

    def find_biases(self, decision: Decision, masks: Mapping[str, Mask]) -> dict[str, torch.Tensor]:
        """Put the masks on, and see what they leave out."""
        data, sites = list(decision.data), list(decision.sites)
        sparsifiers = self._by_layer(sites)
        for name, sparsifier in sparsifiers.items():
            sparsifier.set_threshold(masks[name].threshold)
        probe = Probe(self._model, data, {site.name: site for site in sites}, sparsifiers, self._settings.loss)
        return find_biases(probe, take_part(data, HELD_OUT))

    def _by_layer(self, sites: Sequence[Site]) -> dict[str, ActivationSparsifier]:
        return {mask.rows_of or place: mask for place, mask in self.sparsifiers_of(sites).items()}


def _note(called: set[str], name: str, _module: nn.Module) -> None:
    called.add(name)


def _find_example(model: nn.Module, example: Any) -> Any:
    if example is not None:
        return example
    tokens = getattr(model, "dummy_inputs", None)
    if not isinstance(tokens, dict):
        msg = f"what {type(model).__name__} takes is not known: give a dataset of at least one batch"
        raise DatasetError(msg)
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in tokens.items()}


def _restore(model: nn.Module, places: Iterable[str], existing: Mapping[str, ActivationSparsifier]) -> None:
    for place in places:
        if place in existing:
            insert_sparsifier(model, place, existing[place])
        else:
            remove_sparsifier(get_layer(model, place))

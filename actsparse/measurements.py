"""What algorithms ask of a torch model: weight norms, gradients, sensitivities, distributions of scores."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from torch import nn
from torch.overrides import TorchFunctionMode

from actsparse.algorithms import Attribution, GradientSums, Known, name_sketches
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.calibration import blame_layer, evaluation_mode, run_batches, run_each, run_model
from actsparse.errors import ActsparseError, DatasetError
from actsparse.insertion import intercept_outputs, record_calls, suspend_sparsifiers, watch_gradient
from actsparse.progress import progress_bar
from actsparse.scopes import Site
from actsparse.sparsifier import ActivationSparsifier, mask_small
from actsparse.statistics import MagnitudeSketch

# What a site gives up while its sensitivity is measured, and on how many tokens.
PROBE_SPARSITY = 0.5
PROBE_TOKENS = 512

Loss = Callable[[Any, Any], torch.Tensor]


class TorchMeasurements:
    """
    Measure a torch model on calibration data; see `actsparse.algorithms.measurements.Measurements`.

    :param model: The model, with a mask on every layer that is to be measured; the masks pass everything.
    :param batches: The data; run once for each kind of measurement.
    :param sites: What the layers read.
    :param sparsifiers: The masks by layer name.
    :param loss: What gradients are of: a function of the model's output and its input. None takes the loss that the
        model computes from the batch's labels, or the next-token cross entropy of a causal language model.
    :param known: What was measured before of the same model, sites and data; filled in here.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        sites: list[Site],
        sparsifiers: Mapping[str, ActivationSparsifier],
        loss: Loss | None = None,
        known: Known | None = None,
    ) -> None:
        self._model = model
        self._batches = batches
        self._sites = {site.name: site for site in sites}
        self._sparsifiers = sparsifiers
        self._loss = loss
        self._known = known or Known()

    def weight_norms(self, site: str) -> torch.Tensor:
        """
        Measure the columns of a site's weights, decompressed.

        :param site: The site.
        :return: The norm of each input channel's weights over the site's layers, [in_features]; of each row's where
            rows are masked, [out_features].
        """
        squares = self._known.once("weights", self._measure_squares)
        return torch.stack([squares[layer.name] for layer in self._sites[site].layers]).sum(0).sqrt()

    def once(self, what: Any, measure: Callable[[], Any]) -> Any:
        """
        Find out what was not found out before of this model, its sites and its data.

        :param what: Its name.
        :param measure: Finds it out.
        :return: What it gave, now or earlier.
        """
        return self._known.once(what, measure)

    def multipliers(self, site: str) -> torch.Tensor:
        """
        Measure what a masked tensor is multiplied by before anything else reads it.

        :param site: The site.
        :return: Where rows are masked, the root mean square of each of the layer's outputs, [out_features]; else 1.
        """
        if not self._sites[site].gate_function:
            return torch.ones(())
        return self._known.once("multipliers", self._measure_multipliers)[site]

    def attributions(
        self, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> Mapping[str, Attribution]:
        """
        Run the masked model forwards and backwards, each sequence masked at its own quantiles.

        What gradients are of is the loss the caller gave; else the divergence from the dense model's predictions.

        :param sparsity: The sparsity of each layer; those without one are left dense.
        :param importance: a of each site.
        :param part: Which part of the data, and how many parts there are; a single batch is taken for every part.
        :return: What each layer's mask does.
        :raises ActsparseError: If the model gives no logits, and there is no loss.
        """
        layers = {layer.name: (site, layer) for site in self._sites.values() for layer in site.layers}
        wanted = {
            site.name: sorted({sparsity[x.name] for x in site.layers if sparsity.get(x.name, 0) > 0})
            for site in self._sites.values()
        }
        sums = {name: torch.zeros(3, dtype=torch.float64) for name in layers}
        estimators: dict[str, PooledQuantile] = {}

        def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
            site = self._sparsifiers[name].site
            target = sparsity.get(name, 0.0)

            def mask(values: torch.Tensor) -> torch.Tensor:
                if name == site and wanted[site]:
                    estimators[site] = PooledQuantile(tuple(wanted[site]), importance[site])
                    with blame_layer(name):
                        estimators[site].update(values)
                return estimators[site].mask_batch(values, target) if target > 0 else values

            dropped = x.detach() - self._sparsifiers[name].mask_rest(x.detach(), mask)
            if target <= 0:
                return x
            scores = dropped.float() * importance[site].to(x.device)
            sums[name][2] += float(scores.square().sum(dtype=torch.float64))
            # The values of the masked tensor, and the gradient of x itself: see the attribution allocation.
            return watch_gradient(x - dropped, partial(_add_attribution, sums[name], dropped))

        def run(batch: Any) -> None:
            with torch.no_grad(), suspend_sparsifiers(self._sparsifiers.values()):
                dense = None if self._loss is not None else self._log_probabilities(batch)
            with torch.enable_grad(), self._watch(leave_out):
                if dense is None:
                    loss = self._compute_loss(run_model(self._model, batch), batch)
                else:
                    loss = F.kl_div(self._log_probabilities(batch), dense, reduction="sum", log_target=True)
                loss.backward()

        number, count = part
        batches = self._batches[number::count] or self._batches
        with evaluation_mode(self._model), _without_parameter_gradients(self._model):
            run_each(run, batches, total=len(batches), description="attributing")
        return {name: Attribution(*totals.tolist()) for name, totals in sums.items()}

    def output_errors(
        self, importance: Mapping[str, torch.Tensor], sparsities: Sequence[float]
    ) -> Mapping[str, list[float]]:
        """
        Leave out more and more of each site's input, all others dense.

        :param importance: a of each site.
        :param sparsities: How much to leave out.
        :return: For each site the mean over the first `PROBE_TOKENS` tokens of ‖what the outputs move by‖ / ‖outputs‖,
            without biases. Where rows are masked, outputs are the products with the masked tensor.
        """
        sketches = self.sketches(importance)
        quantiles = {site: [sketch.quantile(s) for s in sparsities] for site, sketch in sketches.items()}
        sums = {site: torch.zeros(len(sparsities), dtype=torch.float64) for site in importance}
        squares: dict[str, torch.Tensor] = {}
        tokens = dict.fromkeys(importance, 0)
        is_inside = False

        def multiply(name: str, x: torch.Tensor) -> torch.Tensor:
            nonlocal is_inside
            site = self._sites[self._sparsifiers[name].site]
            if is_inside or site.name not in sums:
                return x
            is_inside = True
            a = importance[site.name].to(x.device)
            inputs = [x, torch.zeros_like(x), *(mask_small(x, quantile / a) for quantile in quantiles[site.name])]
            if site.gate_function:
                # The layer has not run yet: in the place of its outputs, their usual size.
                outputs = [y.float() * self.multipliers(site.name).to(x.device) for y in inputs]
            else:
                layer = self._model.get_submodule(name)
                outputs = [layer(y).float() for y in inputs]
            is_inside = False
            moved = [(outputs[0] - y).square().sum(-1).flatten().double().cpu() for y in outputs[1:]]
            squares[site.name] = squares.get(site.name, 0.0) + torch.stack(moved)
            return x

        def run(batch: Any) -> None:
            run_model(self._model, batch)
            for site, (whole, *moved) in squares.items():
                sums[site] += (torch.stack(moved) / whole.clamp(min=1e-30)).sqrt().sum(1)
                tokens[site] += len(whole)
            squares.clear()

        for site in importance:
            self.multipliers(site)
        batches = _first_tokens(self._batches, PROBE_TOKENS)
        with evaluation_mode(self._model), torch.no_grad(), self._watch(multiply):
            run_each(run, batches, total=len(batches), description="output errors")
        return {site: (sums[site] / max(tokens[site], 1)).tolist() for site in sums}

    def gradients(self) -> Mapping[str, GradientSums]:
        """
        Run forwards and backwards once for each batch.

        :return: The sums of each site.
        :raises ActsparseError: If there is no loss to take gradients of.
        :raises DatasetError: If a gradient is NaN or infinite; names the layer.
        """
        return self._known.once("gradients", self._measure_gradients)

    def sensitivities(self) -> Mapping[str, float]:
        """
        Sparsify one site after the other and see how far the predictions move.

        :return: For each site √(2 KL / energy): KL from the dense model's predictions, energy Σ x² left out, both over
            the first `PROBE_TOKENS` tokens.
        :raises ActsparseError: If the model gives no logits.
        """
        return self._known.once("sensitivities", self._measure_sensitivities)

    def sketches(self, importance: Mapping[str, torch.Tensor]) -> Mapping[str, MagnitudeSketch]:
        """
        Run forwards and count scores.

        :param importance: a of each site, 0-d or [in_features].
        :return: The sketch of a_j |x_j| of each site.
        """
        return self._known.once(name_sketches(importance), lambda: self._measure_sketches(importance))

    def blocks(self, layers: Collection[str], importance: Mapping[str, torch.Tensor]) -> Iterator["TorchBlock"]:
        """
        Take the model apart into the elements of its module lists.

        :param layers: The layers to mask.
        :param importance: a of each site.
        :return: The blocks that have any of them, with what they read of the first `PROBE_TOKENS` tokens.
        :raises ActsparseError: If a layer is in none.
        """
        if hasattr(self._model, ATR_HOOK_STORAGE):
            msg = "blocks of compressed weights cannot run alone: calibrate first, then compress, then load_thresholds"
            raise ActsparseError(msg)
        names = self._block_names(layers)
        sketches = self.sketches(importance)
        with progress_bar("blocks", total=len(names), unit="blocks") as advance:
            for block, inside in names.items():
                module = self._model.get_submodule(block)
                masks = {name: self._sparsifiers[name] for name in inside}
                scores = {name: (sketches[mask.site], importance[mask.site]) for name, mask in masks.items()}
                yield TorchBlock(module, partial(self._record_calls, module), masks, scores)
                advance(1)

    def _block_names(self, layers: Collection[str]) -> dict[str, list[str]]:
        lists = [name for name, module in self._model.named_modules() if isinstance(module, nn.ModuleList) and name]
        blocks: dict[str, list[str]] = {}
        for layer in layers:
            # The outermost list: experts in a block are part of it.
            owner = min((name for name in lists if layer.startswith(f"{name}.")), key=len, default=None)
            if owner is None:
                msg = f"layer {layer} is in no block: an allocation block by block is not for it"
                raise ActsparseError(msg)
            number = layer.removeprefix(f"{owner}.").partition(".")[0]
            blocks.setdefault(f"{owner}.{number}", []).append(layer)
        return blocks

    def _record_calls(self, block: nn.Module) -> list[tuple[Any, Any, torch.Tensor]]:
        calls = []

        def record(args: Any, kwargs: Any, output: Any) -> None:
            # Run again, a block must not append to a cache of the first run.
            fresh = {key: None if key == "past_key_values" else value for key, value in kwargs.items()}
            calls.append((args, fresh, _first_tensor(output)))

        batches = _first_tokens(self._batches, PROBE_TOKENS)
        with suspend_sparsifiers(self._sparsifiers.values()), record_calls(block, record):
            self._run(batches, "running")
        return calls

    def _measure_multipliers(self) -> dict[str, torch.Tensor]:
        totals: dict[str, tuple[torch.Tensor, int]] = {}

        def add(name: str, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
            total, tokens = totals.get(name, (0.0, 0))
            rows = output.detach().float().flatten(0, -2)
            totals[name] = total + rows.square().sum(0, dtype=torch.float64).cpu(), tokens + len(rows)

        with ExitStack() as stack:
            stack.enter_context(suspend_sparsifiers(self._sparsifiers.values()))
            for name, site in self._sites.items():
                if site.gate_function:
                    stack.enter_context(record_calls(self._model.get_submodule(name), partial(add, name)))
            self._run(self._batches, "measuring")
        _require_seen((name for name, site in self._sites.items() if site.gate_function), totals)
        return {name: (total / max(tokens, 1)).sqrt().float() for name, (total, tokens) in totals.items()}

    def _measure_squares(self) -> dict[str, torch.Tensor]:
        of_rows = {name for name, site in self._sites.items() if site.gate_function}
        reader = _WeightReader(of_rows)

        def expect(name: str, x: torch.Tensor) -> torch.Tensor:
            reader.expected = name
            return x

        with self._watch(expect), reader:
            self._run(self._batches[:1], "reading weights")
        return reader.squares

    def _measure_sketches(self, importance: Mapping[str, torch.Tensor]) -> dict[str, MagnitudeSketch]:
        found = {site: MagnitudeSketch() for site in importance}

        def count(name: str, x: torch.Tensor) -> torch.Tensor:
            if name in found:
                with blame_layer(name):
                    found[name].merge(MagnitudeSketch.of(x.float() * importance[name].to(x.device)))
            return x

        with self._watch(count):
            self._run(self._batches, "counting")
        _require_seen(found, (site for site, sketch in found.items() if sketch.counts.any()))
        return found

    def _measure_gradients(self) -> dict[str, GradientSums]:
        sums: dict[str, GradientSums] = {}
        shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def take_gradient(name: str, x: torch.Tensor) -> torch.Tensor:
            site = self._sparsifiers[name].site
            known = shared.get(site)
            if known is None or known[0] is not x:
                totals = sums.setdefault(site, GradientSums(x.shape[-1]))
                shared[site] = known = (x, watch_gradient(x, partial(_add_gradient, totals, site, x.detach())))
            return known[1]

        def run(batch: Any) -> None:
            with torch.enable_grad():
                self._compute_loss(run_model(self._model, batch), batch).backward()
            shared.clear()

        with evaluation_mode(self._model), _without_parameter_gradients(self._model), self._watch(take_gradient):
            run_each(run, self._batches, total=len(self._batches), description="gradients")
        _require_seen(self._sites, sums)
        return sums

    def _measure_sensitivities(self) -> dict[str, float]:
        ones = {site: torch.ones(()) for site in self._sites}
        quantiles = {site: sketch.quantile(PROBE_SPARSITY) for site, sketch in self.sketches(ones).items()}
        batches = _first_tokens(self._batches, PROBE_TOKENS)
        found = {}
        suspended = suspend_sparsifiers(self._sparsifiers.values())
        with evaluation_mode(self._model), torch.no_grad(), suspended:
            dense = [self._log_probabilities(batch) for batch in batches]
        with progress_bar("sensitivities", total=len(self._sites), unit="sites") as advance:
            for site, quantile in quantiles.items():
                found[site] = self._probe(site, quantile, batches, dense)
                advance(1)
        return found

    def _probe(self, site: str, quantile: float, batches: list[Any], dense: list[torch.Tensor]) -> float:
        names = {layer.name for layer in self._sites[site].layers}
        energy = divergence = 0.0

        def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
            nonlocal energy
            if name not in names:
                return x
            small = x.abs() <= quantile
            if name == site:
                energy += float((x.float() * small).square().sum())
            return x.masked_fill(small, 0.0)

        with evaluation_mode(self._model), torch.no_grad(), self._watch(leave_out):
            for batch, expected in zip(batches, dense, strict=True):
                moved = self._log_probabilities(batch)
                divergence += float(F.kl_div(moved, expected, reduction="sum", log_target=True))
        return (2 * max(divergence, 0.0) / max(energy, 1e-30)) ** 0.5

    def _log_probabilities(self, batch: Any) -> torch.Tensor:
        logits = getattr(run_model(self._model, batch), "logits", None)
        if logits is None:
            msg = f"sensitivities need a model with logits, which {type(self._model).__name__} has not"
            raise ActsparseError(msg)
        return logits.flatten(0, -2).float().log_softmax(-1)

    def _compute_loss(self, output: Any, batch: Any) -> torch.Tensor:
        if self._loss is not None:
            return self._loss(output, batch)
        if getattr(output, "loss", None) is not None:
            return output.loss * batch["labels"].numel()
        can_generate = getattr(self._model, "can_generate", lambda: False)
        if not (can_generate() and isinstance(batch, Mapping) and "input_ids" in batch):
            msg = (
                f"{type(self._model).__name__} has no next-token loss to take gradients of: put labels into the "
                f"batches, pass loss=…, or choose a score that needs no gradient"
            )
            raise ActsparseError(msg)
        labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(())) == 0, -100)[:, 1:]
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="sum")

    def _run(self, batches: list[Any], description: str) -> None:
        run_batches(self._model, batches, total=len(batches), description=description, reads_logits=False)

    def _watch(self, intercept: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
        return _watch(self._sparsifiers, intercept)


class TorchBlock:
    """
    A block and what it read; see `actsparse.algorithms.measurements.Block`.

    :param module: The block.
    :param record: Gives positional and keyword arguments and the dense output of each call; called when first needed.
    :param sparsifiers: The masks of its layers.
    :param scores: For each layer the sketch of its scores, and a.
    """

    def __init__(
        self,
        module: nn.Module,
        record: Callable[[], list[tuple[Any, Any, torch.Tensor]]],
        sparsifiers: Mapping[str, ActivationSparsifier],
        scores: Mapping[str, tuple[MagnitudeSketch, torch.Tensor]],
    ) -> None:
        self.layers = tuple(sparsifiers)
        self._module = module
        self._record = record
        self._sparsifiers = sparsifiers
        self._scores = scores

    @cached_property
    def _calls(self) -> list[tuple[Any, Any, torch.Tensor]]:
        return self._record()

    @cached_property
    def _energy(self) -> float:
        return sum(float(dense.float().square().sum()) for _, _, dense in self._calls)

    def error(self, sparsity: Mapping[str, float]) -> float:
        """
        Run the block with masks.

        :param sparsity: The sparsity of each layer.
        :return: The norm of what its output moves by, beside the norm of the dense output.
        """
        thresholds = {
            name: sketch.quantile(sparsity[name]) / importance
            for name, (sketch, importance) in self._scores.items()
            if sparsity[name] > 0
        }
        moved = 0.0

        def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
            return mask_small(x, thresholds[name]) if name in thresholds else x

        with evaluation_mode(self._module), torch.no_grad(), _watch(self._sparsifiers, leave_out):
            for args, kwargs, dense in self._calls:
                output = _first_tensor(self._module(*args, **kwargs))
                moved += float((output - dense).float().square().sum())
        return (moved / max(self._energy, 1e-30)) ** 0.5


class _WeightReader(TorchFunctionMode):
    """
    See each layer's weight as it is multiplied: decompressed, whatever it is stored as.

    :param of_rows: The layers whose rows are summed up, and not their input channels.
    """

    def __init__(self, of_rows: set[str]) -> None:
        super().__init__()
        self._of_rows = of_rows
        self.expected: str | None = None
        self.squares: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.expected is not None and func in (F.linear, torch.addmm):
            weight = args[1].T if func is F.linear else args[2]
            squares = weight.detach().float().square()
            self.squares[self.expected] = squares.sum(0 if self.expected in self._of_rows else 1).cpu()
            self.expected = None
        return func(*args, **(kwargs or {}))


@contextmanager
def _watch(
    sparsifiers: Mapping[str, ActivationSparsifier], intercept: Callable[[str, torch.Tensor], torch.Tensor]
) -> Any:
    with suspend_sparsifiers(sparsifiers.values()), intercept_outputs(sparsifiers, intercept):
        yield


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Any:
    """Gradients of activations need none of the weights', which would be as large as the model."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _require_seen(sites: Iterable[str], seen: Iterable[str]) -> None:
    unseen = next(iter(set(sites) - set(seen)), None)
    if unseen is not None:
        msg = f"layer {unseen} received no activations from the dataset"
        raise DatasetError(msg)


def _first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _add_gradient(sums: GradientSums, site: str, x: torch.Tensor, g: torch.Tensor) -> None:
    if not torch.isfinite(g).all():
        msg = f"NaN or infinite gradients at the input of layer {site}"
        raise DatasetError(msg)
    sums.add(x, g)


def _add_attribution(sums: torch.Tensor, dropped: torch.Tensor, g: torch.Tensor) -> None:
    by_channel = -(g.float() * dropped.float()).flatten(0, -2).sum(0, dtype=torch.float64).cpu()
    sums[0] += by_channel.sum()
    sums[1] += by_channel.abs().sum()


def _first_tokens(batches: list[Any], tokens: int) -> list[Any]:
    """Take whole batches until there are enough tokens."""
    taken, count = [], 0
    for batch in batches:
        if count >= tokens:
            break
        taken.append(batch)
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        count += ids.numel() if ids is not None else tokens
    return taken

"""Recovery: a masked model learns, from its own dense predictions, to live with its masks."""

import hashlib
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from rich.table import Table
from torch import nn

from actsparse.calibration import CalibrationBatches, describe_batch
from actsparse.errors import ActsparseError, DatasetError, OutputError, one_line
from actsparse.recovery.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from actsparse.recovery.weights import Biases, LowRankWeights, TrainedWeights, WholeWeights
from actsparse.runtime.progress import progress_bar
from actsparse.storage.files import kind_of, prepare_folder
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.torch.layers import measure_sizes
from actsparse.torch.offload import require_weights
from actsparse.torch.running import evaluation_mode, run_model
from actsparse.torch.sparsifier import ActivationSparsifier
from actsparse.torch.wrappers import as_written, get_layer, unwrap

# The learning rate rises over this share of the steps, then falls along a cosine to this share of its height.
WARM_UP = 0.1
FINAL_RATE = 0.1
# Gradients are cut to this norm: those of single steps can be many times as large as the rest.
LARGEST_GRADIENT = 1.0
# The share of the batches that is held out where the caller holds out none.
HELD_OUT = 0.1
RATES = {"whole": 1e-4, "low-rank": 1e-3, "bias": 1e-2}
# What may be trained.
TRAINED = ("weights", "bias")


@dataclass(frozen=True)
class Look:
    """
    The model on the held-out data.

    :param step: Steps trained before it.
    :param divergence: KL(dense ‖ masked) per token, in nats.
    """

    step: int
    divergence: float


@dataclass(frozen=True)
class Recovery:
    """
    What a recovery did.

    :param looks: At the held-out data, in order, the first before any training.
    :param steps: Steps trained; the model is left as it was at the best look.
    :param seconds: How long this call took.
    """

    looks: tuple[Look, ...]
    steps: int
    seconds: float

    @property
    def before(self) -> Look:
        """The look before any training."""
        return self.looks[0]

    @property
    def best(self) -> Look:
        """The look with the least divergence."""
        return min(self.looks, key=lambda look: look.divergence)

    def to_table(self) -> Table:
        """
        Draw the recovery for a terminal.

        :return: A rich table.
        """
        table = Table(title=f"Recovery: {self.steps} steps in {self.seconds / 60:.1f} minutes")
        table.add_column("steps", justify="right")
        table.add_column("divergence from the dense model, held out", justify="right")
        table.add_column("")
        for look in self.looks:
            table.add_row(str(look.step), f"{look.divergence:.4f}", "taken" if look == self.best else "")
        return table

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the recovery into what JSON can hold.

        :return: Its figures.
        """
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "best_step": self.best.step,
            "divergence_before": self.before.divergence,
            "divergence_after": self.best.divergence,
            "looks": [asdict(look) for look in self.looks],
        }


@dataclass(frozen=True)
class Settings:
    """How `recover` trains; see there."""

    steps: int
    learning_rate: float | None
    batches_per_step: int
    rank: int | None
    evaluate_every: int
    patience: int
    seed: int
    dtype: torch.dtype
    train: str = "weights"

    def __post_init__(self) -> None:
        for name in ("steps", "batches_per_step", "rank", "evaluate_every", "patience"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (name == "rank" and value is None) and not (is_whole and value >= 1):
                msg = f"{name} is {value!r}; it must be a whole number, at least 1"
                raise ActsparseError(msg)
        rate = self.learning_rate
        if rate is not None and not (isinstance(rate, float) and 0 < rate < 1):
            msg = f"learning_rate is {rate!r}; it must be between 0 and 1, such as 1e-4"
            raise ActsparseError(msg)
        if self.train not in TRAINED:
            msg = f"train is {self.train!r}; it must be one of {', '.join(TRAINED)}"
            raise ActsparseError(msg)
        if self.train == "bias" and self.rank is not None:
            msg = "a rank is for weights: leave it out where biases are trained"
            raise ActsparseError(msg)
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            msg = f"dtype is {self.dtype!r}; it must be torch.float32, torch.bfloat16 or torch.float16"
            raise ActsparseError(msg)

    def rate(self, step: int) -> float:
        """
        Give the learning rate.

        :param step: Steps done before.
        :return: The rate of the next one.
        """
        usual = RATES["bias" if self.train == "bias" else "whole" if self.rank is None else "low-rank"]
        return learning_rate(step, self.steps, self.learning_rate or usual)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """
    Give the learning rate of a step.

    :param step: Steps done before.
    :param steps: How many there are.
    :param highest: The rate after the warm-up, from which it falls along a cosine.
    :return: The rate.
    """
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return highest * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return highest * (FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2)


def recover(
    model: nn.Module,
    dataset: Iterable[Any],
    *,
    steps: int = 200,
    held_out: Iterable[Any] | None = None,
    checkpoint: str | Path | None = None,
    learning_rate: float | None = None,
    batches_per_step: int = 4,
    rank: int | None = None,
    evaluate_every: int = 25,
    patience: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    train: str = "weights",
) -> Recovery:
    """
    Train a masked model for a short while on its own dense predictions, in place.

    The teacher is the model itself without its masks and with the weights it has when it is called; what is trained are
    the weights of the masked layers, to the KL divergence from the teacher's predictions. Masks and thresholds stay.
    Recover before `nncf.compress_weights`: compressed weights cannot be trained.

    With ``train="bias"`` the weights stay, too: what is trained is one vector for each masked tensor, which its layers
    get besides what the mask lets pass (SPON, arXiv 2512.12744). It costs nothing at run time, thresholds files keep
    it, and weights may be compressed.

    An interrupted call leaves the model as it was. With a checkpoint, calling it again on the same model goes on where
    the last look at the held-out data was.

    :param model: A masked torch model with logits.
    :param dataset: Model inputs to train on, kept in memory; shuffled, and read again when all have been used.
    :param steps: Optimizer steps at most.
    :param held_out: Model inputs to judge by, not trained on; a tenth of the dataset, its end, if left out.
    :param checkpoint: A file to go on from and to write at every look.
    :param learning_rate: The highest of AdamW; by default 1e-4, for low-rank additions 1e-3; for biases, as a share of
        each site's threshold, 1e-2.
    :param batches_per_step: Batches whose gradients make one step.
    :param rank: Train low-rank additions of this rank (LoRA), merged at the end, instead of whole weights: needs less
        memory.
    :param evaluate_every: Steps between looks at the held-out data.
    :param patience: Stop after so many looks in a row without a new best.
    :param seed: Of the order of the batches.
    :param dtype: What forwards and backwards compute in; the trained weights stay as they are stored.
    :param train: ``weights`` or ``bias``.
    :return: What was reached. The model is left as it was at the best look.
    :raises ActsparseError: If the model has no masks, compressed weights or no logits, or a setting is impossible.
    :raises DatasetError: If the data is too little, or the model cannot take it.
    :raises SourceError: If the checkpoint cannot be read or belongs to another run.
    :raises OutputError: If the checkpoint cannot be written.
    """
    start = time.perf_counter()
    model = unwrap(model)
    require_weights(model, "recovery")
    settings = Settings(
        steps, learning_rate, batches_per_step, rank, evaluate_every, patience, seed, dtype, train
    )  # fmt: skip
    layers, masks = _masked_layers(model, settings)
    batches, judge = _split(dataset, held_out)
    path = None if checkpoint is None else Path(checkpoint)
    run, state = "", Checkpoint()
    if path is not None:
        if kind_of(path, OutputError) == "folder":
            msg = f"the checkpoint {path} is a folder; name a file"
            raise OutputError(msg)
        prepare_folder(path.parent)
        run = _name_run(model, batches, settings)
        state = read_checkpoint(path, run)
    weights: TrainedWeights
    if train == "bias":
        weights = Biases(masks, {name: size.channels for name, size in measure_sizes(model).items()})
    else:
        weights = WholeWeights(layers) if rank is None else LowRankWeights(layers, rank, seed)
    save = (lambda state: write_checkpoint(path, state, run)) if path is not None else (lambda _state: None)
    try:
        with as_written(), evaluation_mode(model), _only(model, weights.parameters.values()):
            looks = _Trainer(model, weights, settings, batches, judge).run(state, save)
    except BaseException:
        weights.undo()
        raise
    weights.keep()
    return Recovery(looks, looks[-1].step, time.perf_counter() - start)


class _Trainer:
    def __init__(
        self, model: nn.Module, weights: TrainedWeights, settings: Settings, train: list[Any], held_out: list[Any]
    ) -> None:
        self._model = model
        self._weights = weights
        self._settings = settings
        self._train = train
        self._held_out = held_out
        self._masks = [mask for _, mask in named_sparsifiers(model)]
        groups = [{"params": [x], "scale": weights.scales.get(name, 1.0)} for name, x in weights.parameters.items()]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def run(self, state: Checkpoint, save: Any) -> tuple[Look, ...]:
        """Train until the steps are done or nothing is gained any more, and go back to the best."""
        settings = self._settings
        looks = [Look(**look) for look in state.looks]
        best = state.of_kind("best") or self._copy()
        if looks:
            self._resume(state)
        else:
            looks.append(Look(0, self._divergence()))
        step = looks[-1].step
        with progress_bar("recovering", total=settings.steps, unit="steps") as advance:
            advance(step)
            while step < settings.steps and not self._has_stopped(looks):
                self._step(step)
                step += 1
                advance(1)
                if step % settings.evaluate_every == 0 or step == settings.steps:
                    looks.append(Look(step, self._divergence()))
                    if looks[-1].divergence <= min(look.divergence for look in looks):
                        best = self._copy()
                    save(self._state(looks, best))
        self._load(best)
        return tuple(looks)

    def _has_stopped(self, looks: list[Look]) -> bool:
        recent = looks[-self._settings.patience :]
        earlier = looks[: -self._settings.patience]
        return bool(earlier) and min(x.divergence for x in recent) >= min(x.divergence for x in earlier)

    def _step(self, step: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate(step) * group["scale"]
        self._optimizer.zero_grad()
        batches = [self._train[i] for i in self._order(step)]
        tokens = 0
        for batch in batches:
            divergence, count = self._measure(batch, with_gradients=True)
            if not math.isfinite(divergence):
                msg = f"the divergence is {divergence} at step {step} ({describe_batch(batch)}): take a lower rate"
                raise DatasetError(msg)
            tokens += count
        for parameter in self._weights.parameters.values():
            if parameter.grad is not None:
                parameter.grad /= max(tokens, 1)
        nn.utils.clip_grad_norm_(self._weights.parameters.values(), LARGEST_GRADIENT)
        self._optimizer.step()

    def _order(self, step: int) -> list[int]:
        """Choose the batches of a step: each once before any comes again, in an order that only the seed decides."""
        per_step, count = self._settings.batches_per_step, len(self._train)
        chosen = []
        for position in range(step * per_step, (step + 1) * per_step):
            epoch, index = divmod(position, count)
            order = list(range(count))
            random.Random(f"{self._settings.seed} {epoch}").shuffle(order)
            chosen.append(order[index])
        return chosen

    def _divergence(self) -> float:
        with torch.no_grad():
            sums = [self._measure(batch, with_gradients=False) for batch in self._held_out]
        return sum(divergence for divergence, _ in sums) / max(sum(tokens for _, tokens in sums), 1)

    def _measure(self, batch: Any, *, with_gradients: bool) -> tuple[float, int]:
        """Sum KL(dense ‖ masked) over a batch's tokens; padding is none."""
        with torch.no_grad(), self._weights.dense(), suspend_sparsifiers(self._masks):
            expected = self._log_probabilities(batch)
        with torch.set_grad_enabled(with_gradients):
            found = self._log_probabilities(batch)
            by_token = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
            attended = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if attended is not None:
                by_token = by_token * attended.flatten().to(by_token)
            total = by_token.sum()
            if total.requires_grad:  # not where the batch reaches no masked layer
                total.backward()
        return float(total.detach()), int(attended.sum()) if attended is not None else len(by_token)

    def _log_probabilities(self, batch: Any) -> torch.Tensor:
        device = next(iter(self._weights.parameters.values())).device
        is_lower = self._settings.dtype != torch.float32
        try:
            with torch.autocast(device.type, self._settings.dtype if is_lower else None, enabled=is_lower):
                logits = getattr(run_model(self._model, batch), "logits", None)
        except Exception as error:
            msg = f"the model cannot take a batch ({describe_batch(batch)}): {one_line(error)}"
            raise DatasetError(msg) from error
        if logits is None:
            msg = f"recovery needs a model with logits, which {type(self._model).__name__} has not"
            raise ActsparseError(msg)
        return logits.flatten(0, -2).float().log_softmax(-1)

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._weights.parameters.items()}

    def _load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._weights.parameters.items():
                parameter.copy_(tensors[name])

    def _state(self, looks: list[Look], best: dict[str, torch.Tensor]) -> Checkpoint:
        tensors = {f"best/{name}": tensor for name, tensor in best.items()}
        for name, parameter in self._weights.parameters.items():
            tensors[f"trained/{name}"] = parameter
            # Nothing for a layer that no gradient has reached, such as a rare expert.
            tensors |= {f"{kind}/{name}": moment for kind, moment in self._optimizer.state[parameter].items()}
        return Checkpoint(looks[-1].step, [asdict(look) for look in looks], tensors)

    def _resume(self, state: Checkpoint) -> None:
        self._load(state.of_kind("trained"))
        steps, averages, squares = (state.of_kind(kind) for kind in ("step", "exp_avg", "exp_avg_sq"))
        for name, parameter in self._weights.parameters.items():
            if name in averages:
                self._optimizer.state[parameter] = {
                    # Checkpoints of earlier versions have no steps.
                    "step": steps.get(name, torch.tensor(float(state.step))),
                    "exp_avg": averages[name].to(parameter.device),
                    "exp_avg_sq": squares[name].to(parameter.device),
                }


def _masked_layers(
    model: nn.Module, settings: Settings
) -> tuple[dict[str, nn.Module], dict[str, ActivationSparsifier]]:
    if not isinstance(model, nn.Module):
        msg = f"recovery trains torch models, not {type(model).__name__}; deploy the recovered model afterwards"
        raise ActsparseError(msg)
    layers = {name: get_layer(model, name) for name, _ in named_sparsifiers(model)}
    # Nothing makes up for a row whose gate is closed.
    masks = {name: mask for name, mask in named_sparsifiers(model) if not mask.rows_of}
    if not layers:
        msg = "the model has no activation sparsifiers to recover from: call sparsify_activations first"
        raise ActsparseError(msg)
    if settings.train == "bias":
        if not masks:
            msg = "all masks are of rows, for which no bias makes up: train weights"
            raise ActsparseError(msg)
        return layers, masks
    if hasattr(model, ATR_HOOK_STORAGE):
        msg = "compressed weights cannot be trained: recover first, then compress"
        raise ActsparseError(msg)
    stored = {layer.weight.dtype for layer in layers.values()}
    if settings.rank is None and stored != {torch.float32}:
        names = ", ".join(sorted(str(dtype) for dtype in stored))
        msg = f"weights in {names} are too coarse for small steps: load the model in float32, or give a rank"
        raise ActsparseError(msg)
    return layers, masks


def _split(dataset: Iterable[Any], held_out: Iterable[Any] | None) -> tuple[list[Any], list[Any]]:
    train = list(CalibrationBatches(dataset))
    if held_out is not None:
        return train, list(CalibrationBatches(held_out))
    count = max(1, round(HELD_OUT * len(train)))
    if count == len(train):
        msg = "one batch is too little to recover with: a tenth of the data is held out, and the rest trained on"
        raise DatasetError(msg)
    return train[:-count], train[-count:]


def _name_run(model: nn.Module, train: list[Any], settings: Settings) -> str:
    """Hash what a checkpoint depends on, so that it is not gone on with elsewhere."""
    digest = hashlib.sha256(json.dumps(asdict(settings), default=str, sort_keys=True).encode())
    digest.update(f"{len(train)} {describe_batch(train[0])}".encode())
    for name, mask in named_sparsifiers(model):
        weight = get_layer(model, name).weight
        sums = [float(weight.detach().double().sum()), float(weight.detach().double().square().sum())]  # type: ignore[union-attr]
        bias = None if mask.bias is None else float(mask.bias.double().sum())
        digest.update(f"{name} {mask.threshold.flatten()[:4].tolist()} {bias} {sums}".encode())
    return digest.hexdigest()


@contextmanager
def _only(model: nn.Module, trained: Iterable[torch.Tensor]) -> Iterator[None]:
    """Take gradients of the trained parameters and of no others."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None

"""As sparse as a perplexity allows: the target sparsity found by bisection on held-out text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from actsparse.algorithms import get_allocating_algorithm
from actsparse.algorithms.bisection import Tried, next_guess
from actsparse.calibration import Settings
from actsparse.console.report import percent
from actsparse.errors import ActsparseError
from actsparse.evaluation.comparison import LossComparison, compare_losses
from actsparse.runtime.progress import Say
from actsparse.sparsify import calibrate, remove_sparsifiers
from actsparse.texts.bos import warn_of_missing_bos

MAX_EVALUATIONS = 15
# Sparsity is known well enough to stop.
SPARSITY_TOLERANCE = 0.004
# So near to the increase allowed, as a share of it, another step is not worth an evaluation.
INCREASE_TOLERANCE = 0.05


@dataclass(frozen=True)
class BudgetStep:
    """
    One sparsity that was tried.

    :param target: Target sparsity.
    :param comparison: The masked model beside the dense one on the held-out text.
    """

    target: float
    comparison: LossComparison

    @property
    def perplexity_increase(self) -> float:
        """Token perplexity over the dense model's, less 1."""
        return math.expm1(self.comparison.loss_increase)


@dataclass(frozen=True)
class BudgetResult:
    """
    What a perplexity allows.

    :param best: The sparsest step within the limit, which the model is left with; None where there is none, and the
        model is left without masks.
    :param steps: All that was tried, in order.
    """

    best: BudgetStep | None
    steps: tuple[BudgetStep, ...]

    def to_table(self, text: str) -> Table:
        """
        Draw the search for a terminal.

        :param text: The name of the held-out text.
        :return: A rich table.
        """
        table = Table(title=escape(f"Sparsity against perplexity on {text}"))
        for column in ("step", "target", "measured", "perplexity", ""):
            table.add_column(column, justify="right")
        for number, step in enumerate(self.steps, start=1):
            measured, increase = step.comparison.sparsity.sparsity, f"{100 * step.perplexity_increase:+.2f}%"
            table.add_row(
                str(number), percent(step.target), percent(measured), increase, "taken" if step is self.best else ""
            )
        return table

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the search into what JSON can hold.

        :return: The sparsity taken, and each step.
        """
        steps = [
            {
                "target": step.target,
                "measured_sparsity": step.comparison.sparsity.sparsity,
                "perplexity_increase": step.perplexity_increase,
                "loss_increase_interval": list(step.comparison.loss_increase_interval),
            }
            for step in self.steps
        ]
        return {"target": self.best.target if self.best else None, "steps": steps}


def sparsify_to_perplexity(
    model: Any,
    tokenizer: Any,
    dataset: Sequence[Any],
    held_out: Sequence[str],
    *,
    max_perplexity_increase: float = 0.01,
    algorithm: str = "magnitude",
    max_length: int = 512,
    scopes: Sequence[Any] = (),
    ignored_scope: Any = None,
    skip_first: int = 0,
    say: Say = lambda _line: None,
) -> BudgetResult:
    """
    Mask a model as sparsely as a limit on its perplexity allows (PPL-p%, arXiv 2411.02335, on text of its own).

    The loss hardly changes at low sparsity and then grows ever faster, so the next sparsity is tried where a power law
    through the ends of the interval meets the limit, and in its middle where that brings little.

    :param model: A torch causal language model; changed in place.
    :param tokenizer: Its tokenizer.
    :param dataset: Calibration batches, which are run for every step.
    :param held_out: Pages on which perplexity is measured: other text than the calibration data.
    :param max_perplexity_increase: How much higher token perplexity may be, as a share: 0.01 is 1%.
    :param algorithm: See `sparsify_activations`.
    :param max_length: The window in tokens.
    :param scopes: Target scopes that share the sparsity; none stands for all Linear layers of the blocks.
    :param ignored_scope: Layers to leave out.
    :param skip_first: See `sparsify_activations`.
    :param say: Told of each step.
    :return: The sparsity reached and the way there; at most `MAX_EVALUATIONS` steps.
    :raises ActsparseError: If the limit is not a positive number, or as `sparsify_activations`.
    """
    is_number = isinstance(max_perplexity_increase, int | float) and not isinstance(max_perplexity_increase, bool)
    if not is_number or not 0 < max_perplexity_increase < math.inf:
        msg = f"max_perplexity_increase is {max_perplexity_increase!r}; it must be a positive number, such as 0.01"
        raise ActsparseError(msg)
    settings = Settings(get_allocating_algorithm(algorithm), skip_first=skip_first)
    if len(dataset):
        warn_of_missing_bos(tokenizer, dataset[0])
    limit = math.log1p(max_perplexity_increase)
    steps: list[BudgetStep] = []

    def mask(target: float) -> None:
        by_scope = dict.fromkeys(scopes, target) if scopes else target
        calibrate(model, dataset, by_scope, ignored_scope, settings)

    def measure(target: float) -> BudgetStep:
        mask(target)
        # Without masks the model is the same at every step.
        dense = steps[0].comparison.dense if steps else None
        step = BudgetStep(target, compare_losses(model, tokenizer, held_out, max_length=max_length, dense=dense))
        steps.append(step)
        say(f"{100 * target:.1f}%: perplexity {100 * step.perplexity_increase:+.2f}%")
        return step

    low, high = 0.0, 1.0
    below: BudgetStep | None = None
    above: BudgetStep | None = None
    while len(steps) < MAX_EVALUATIONS and high - low > SPARSITY_TOLERANCE:
        step = measure(next_guess(low, high, _tried(below), _tried(above), limit))
        if step.comparison.loss_increase <= limit:
            low, below = step.target, step
            if step.comparison.loss_increase >= (1 - INCREASE_TOLERANCE) * limit:
                break
        else:
            high, above = step.target, step
    if below is None:
        remove_sparsifiers(model)
    elif steps[-1] is not below:
        mask(low)
    return BudgetResult(below, tuple(steps))


def _tried(step: BudgetStep | None) -> Tried | None:
    return None if step is None else (step.target, step.comparison.loss_increase)

"""The figures of a regression case: what they are called, which direction is bad, and their values."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actsparse.commands.regression.records import make_mapping, make_record
from actsparse.errors import SourceError
from actsparse.evaluation.bootstrap import bootstrap_interval


@dataclass(frozen=True)
class Kind:
    """
    What a figure is.

    :param bad: The direction that is a regression: ``up``, ``down``, or ``both``.
    :param losses: For a figure of the loss, the windows' sums that it comes from: the second is subtracted.
    """

    title: str
    bad: str
    losses: tuple[str, ...] = ()
    is_share: bool = False

    def show(self, value: float) -> str:
        """Format a value."""
        return f"{100 * value:.2f}%" if self.is_share else f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


DENSE, SPARSE, NNCF = "dense", "sparse", "nncf"
KINDS = {
    "word_perplexity": Kind("word perplexity", "up", (SPARSE,)),
    "token_perplexity": Kind("token perplexity", "up", (SPARSE,)),
    "dense_word_perplexity": Kind("dense word perplexity", "up", (DENSE,)),
    "dense_token_perplexity": Kind("dense token perplexity", "up", (DENSE,)),
    "loss_increase": Kind("loss increase, nats a token", "up", (SPARSE, DENSE)),
    "sparsity": Kind("sparsity", "both", is_share=True),
    "farthest_layer": Kind("farthest layer from its target", "up", is_share=True),
    "weight_reads_skipped": Kind("weight reads skipped", "down", is_share=True),
    "calibration_ratio": Kind("calibration over forward passes, time", "up"),
    "peak_memory_mb": Kind("peak memory, MB", "up"),
    "decode_ratio": Kind("decoding speed over dense", "down"),
    "nncf_word_perplexity": Kind("NNCF's word perplexity", "up", (NNCF,)),
    "nncf_loss_increase": Kind("NNCF's loss increase, nats a token", "up", (NNCF, DENSE)),
    "loss_over_nncf": Kind("loss above NNCF's, nats a token", "up", (SPARSE, NNCF)),
    "nncf_sparsity": Kind("NNCF's sparsity", "both", is_share=True),
    "nncf_calibration_ratio": Kind("NNCF's calibration over forward passes, time", "up"),
}


@dataclass(frozen=True)
class Figure:
    """A figure, with its 95% interval over windows of text where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Windows:
    """
    The evaluation text's loss, window by window.

    :param losses: Sums of their negative log-likelihoods in nats: of the dense model, the sparse one, and NNCF's.
    """

    words: int
    tokens: tuple[float, ...]
    losses: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if self.words < 1 or not self.tokens or min(self.tokens) < 1:
            msg = "windows need words, and a token each"
            raise SourceError(msg)
        for name, losses in self.losses.items():
            if len(losses) != len(self.tokens):
                msg = f"there are {len(self.tokens)} windows but {len(losses)} losses of {name[:40]!r}"
                raise SourceError(msg)

    def token_losses(self, names: tuple[str, ...]) -> np.ndarray:
        """
        Give each window's loss per token, or a difference of two.

        :param names: Of which model; less that of the second, if there is one.
        :return: Nats, [windows].
        """
        first, *rest = (np.array(self.losses[name]) for name in names)
        return (first - rest[0] if rest else first) / np.array(self.tokens)

    def make_figure(self, name: str) -> Figure:
        """
        Work out a figure of the loss.

        :param name: Its name in `KINDS`.
        """
        tokens = np.array(self.tokens)
        values = self.token_losses(KINDS[name].losses)
        ends = (float((values * tokens).sum() / tokens.sum()), *bootstrap_interval(values, tokens))
        if not name.endswith("perplexity"):
            return Figure(*ends)
        # Words are counted for the text, not by window: there are as many to a token in every draw.
        scale = float(tokens.sum()) / self.words if name.endswith("word_perplexity") else 1.0
        return Figure(*(_exp(scale * end) for end in ends))


@dataclass(frozen=True)
class CaseResult:
    """
    What was measured of a case.

    :param inputs: What has to be equal for another result to be comparable; see `Inputs.describe`.
    :param figures: By name, in the order of `KINDS`.
    :param details: Seconds, texts, layers that the kernel runs: what helps to understand the figures.
    """

    name: str
    inputs: dict[str, str]
    figures: dict[str, Figure]
    layers: dict[str, float]
    windows: Windows
    details: dict[str, Any] = field(default_factory=dict)
    git: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    measured_at: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Turn the result into what JSON can hold."""
        return make_mapping(self)

    @classmethod
    def from_dict(cls, contents: Any, where: str) -> "CaseResult":
        """
        Read what `to_dict` wrote.

        :raises SourceError: If it is something else.
        """
        result = make_record(cls, contents, where)
        if not result.figures:
            msg = f"{where} has no figures"
            raise SourceError(msg)
        unknown = next((name for name in result.figures if name not in KINDS), None)
        if unknown is not None:
            msg = f"{where} has a figure {unknown[:60]!r} that this version does not know"
            raise SourceError(msg)
        for name in result.figures:
            lacking = next((side for side in KINDS[name].losses if side not in result.windows.losses), None)
            if lacking is not None:
                msg = f"{where} has the figure {name}, but no losses of {lacking!r}, which it comes from"
                raise SourceError(msg)
        return result


def loss_figures(windows: Windows) -> dict[str, Figure]:
    """Work out all figures of the loss that there are losses for."""
    names = [name for name, kind in KINDS.items() if kind.losses and {*kind.losses} <= windows.losses.keys()]
    return {name: windows.make_figure(name) for name in names}


def _exp(exponent: float) -> float:
    # What JSON and YAML can hold: no infinity.
    return math.exp(min(exponent, 700.0))

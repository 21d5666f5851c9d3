"""How far a figure may be from its reference before that is a regression."""

from dataclasses import dataclass

from actsparse.commands.regression.figures import KINDS
from actsparse.errors import SourceError, nearest


@dataclass(frozen=True)
class Tolerance:
    """
    A tolerance: one of three.

    :param absolute: The figure may be that much worse.
    :param relative: The figure may be worse by that share of the reference.
    :param interval: For figures of the loss: the 95% interval of the difference to the reference's windows, paired,
        must reach that many nats a token of worse. 0 asks that a difference be told from none.
    """

    absolute: float | None = None
    relative: float | None = None
    interval: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.absolute, self.relative, self.interval) if value is not None]
        if len(given) != 1:
            msg = "a tolerance is one of absolute, relative and interval"
            raise SourceError(msg)
        if given[0] < 0:
            msg = f"a tolerance is 0 or more, not {given[0]}"
            raise SourceError(msg)


# What a first --update writes; the other figures are shown and not judged. benchmarks/planted_regression.py shows what
# those of loss and sparsity catch and what they let pass. Times and memory are only roughly the same on other machines.
DEFAULTS = {
    "word_perplexity": Tolerance(interval=0.02),
    "dense_word_perplexity": Tolerance(interval=0.005),
    "sparsity": Tolerance(absolute=0.01),
    "farthest_layer": Tolerance(absolute=0.03),
    "weight_reads_skipped": Tolerance(absolute=0.01),
    "calibration_ratio": Tolerance(relative=0.5),
    "peak_memory_mb": Tolerance(relative=0.3),
    "decode_ratio": Tolerance(relative=0.15),
}


def check_tolerance(figure: str, tolerance: Tolerance | None) -> None:
    """
    Check that a tolerance goes with a figure.

    :param figure: The figure's name.
    :param tolerance: The tolerance; None for a figure that is not judged.
    :raises SourceError: If there is no such figure, or its windows' losses are not known.
    """
    if figure not in KINDS:
        msg = f"there is no figure {figure[:60]!r}; nearest: {nearest(figure[:60], KINDS)}"
        raise SourceError(msg)
    if tolerance is not None and tolerance.interval is not None and not KINDS[figure].losses:
        msg = f"{figure} is no figure of the loss: it takes absolute or relative"
        raise SourceError(msg)

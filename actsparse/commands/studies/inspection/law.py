"""The sparsing law: how the activation ratio goes on while a model learns (arXiv 2411.02335)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RISING, FALLING = "A = A0 - c / D^α", "A = A0 + exp(b - c D^α)"


@dataclass(frozen=True)
class Law:
    """
    A law fitted to activation ratios.

    :param form: `RISING`, a power law, as models with SiLU follow; or `FALLING`, one in logarithmic space, as those
        with ReLU do.
    :param parameters: Its parameters; D in millions of tokens.
    """

    form: str
    parameters: dict[str, float]
    r_squared: float

    @property
    def limit(self) -> float:
        """The activation ratio after endless training."""
        return self.parameters["A0"]

    def predict(self, tokens: Sequence[float]) -> np.ndarray:
        """Evaluate the law."""
        function = _rising if self.form == RISING else _falling
        return function(np.asarray(tokens) / 1e6, *self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        """Turn the law into what JSON can hold."""
        return {"form": self.form, "parameters": self.parameters, "r_squared": self.r_squared}


def fit_law(tokens: Sequence[float], ratios: Sequence[float]) -> Law | None:
    """
    Fit both of the paper's laws and take the better one.

    :return: The law; None where there are too few points (a law needs one more than it has parameters), or neither can
        be fitted.
    """
    from scipy.optimize import curve_fit

    d, a = np.asarray(tokens, dtype=np.float64) / 1e6, np.asarray(ratios, dtype=np.float64)
    spread = float(a.max() - a.min()) if len(a) else 0.0
    if len(a) < 4 or len(set(tokens)) < len(tokens) or (d <= 0).any() or spread == 0:
        return None
    found: list[Law] = []
    # Starting points: the last ratio is near the limit, and the first a spread away from it.
    candidates: list[tuple[str, Any, tuple[str, ...], list[float], Any]] = [
        (RISING, _rising, ("A0", "c", "α"), [a[-1], spread * d[0] ** 0.5, 0.5], ([0, 0, 0.01], [1, np.inf, 5]))
    ]
    if len(a) >= 5:
        start = [max(a.min() - 0.1 * spread, 0.0), 1 / np.median(d) ** 0.5, 0.5, np.log(spread)]
        bounds = ([0, 0, 0.01, -np.inf], [1, np.inf, 5, np.inf])
        candidates.append((FALLING, _falling, ("A0", "c", "α", "b"), start, bounds))
    for form, function, names, start, bounds in candidates:
        try:
            fitted, _ = curve_fit(function, d, a, p0=start, bounds=bounds, maxfev=20000)
        except (RuntimeError, ValueError):
            continue
        residual = float(np.square(a - function(d, *fitted)).sum())
        parameters = {name: float(value) for name, value in zip(names, fitted, strict=True)}
        found.append(Law(form, parameters, 1 - residual / float(np.square(a - a.mean()).sum())))
    return max(found, key=lambda law: law.r_squared, default=None)


def _rising(d: np.ndarray, limit: float, c: float, alpha: float) -> np.ndarray:
    return limit - c / d**alpha


def _falling(d: np.ndarray, limit: float, c: float, alpha: float, b: float) -> np.ndarray:
    return limit + np.exp(np.clip(b - c * d**alpha, -700, 700))

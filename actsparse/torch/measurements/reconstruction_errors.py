"""How far the outputs of a site's layers move when what they read is masked in one way or another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from actsparse.algorithms import Trial
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.calibration import blame_layer, run_each
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.running import evaluation_mode, run_model
from actsparse.torch.wrappers import get_layer


class ReconstructionErrors:
    """Means over tokens of ‖what the outputs of a site's layers move by‖ / ‖outputs‖, for several ways to move them."""

    def __init__(self) -> None:
        self._squares: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, site: str, whole: torch.Tensor, moves: Iterable[torch.Tensor]) -> None:
        """
        Take in the outputs of one of a site's layers on one batch.

        :param whole: The outputs without biases, [..., tokens, out_features].
        :param moves: What they move by, each time in the same way as for the site's other layers.
        """
        found = torch.stack([y.float().square().sum(-1).flatten().double().cpu() for y in (whole, *moves)])
        self._squares[site] = self._squares[site] + found if site in self._squares else found

    def end_batch(self) -> None:
        """Sum up a batch that has gone through all layers."""
        for site, (whole, *moved) in self._squares.items():
            ratios = (torch.stack(moved) / whole.clamp(min=1e-30)).sqrt().sum(1)
            self._sums[site] = self._sums[site] + ratios if site in self._sums else ratios
            self._tokens[site] = self._tokens.get(site, 0) + len(whole)
        self._squares.clear()

    def means(self, site: str, ways: int) -> list[float]:
        """
        Give what was found.

        :return: One mean for each; 0 for a site that no token reached, as an expert.
        """
        return (self._sums[site] / self._tokens[site]).tolist() if site in self._sums else [0.0] * ways


def measure_reconstruction_errors(
    probe: Probe, trials: Sequence[Trial], importance: Mapping[str, torch.Tensor]
) -> list[float]:
    """
    Mask one site in several ways, each sequence at its own quantile, all other sites dense.

    :return: For each trial the mean over the first `PROBE_TOKENS` tokens of ‖what the outputs move by‖ / ‖outputs‖,
        over all the site's layers and without biases.
    """
    by_site: dict[str, list[int]] = {}
    for number, trial in enumerate(trials):
        by_site.setdefault(trial.site, []).append(number)
    found = ReconstructionErrors()
    is_inside = False

    def try_all(name: str, x: torch.Tensor) -> torch.Tensor:
        nonlocal is_inside
        site = probe.sparsifiers[name].site
        if is_inside or site not in by_site:
            return x
        is_inside = True
        layer = get_layer(probe.model, name)
        nothing = layer(torch.zeros_like(x[..., :1, :]))
        moved = []
        for number in by_site[site]:
            with blame_layer(name):
                left = x - _mask(x, trials[number], trials[number].zeros[name], importance[site])
            moved.append(layer(left) - nothing)
        found.add(site, layer(x) - nothing, moved)
        is_inside = False
        return x

    def run(batch: Any) -> None:
        run_model(probe.model, batch)
        found.end_batch()

    batches = probe.first_batches
    with evaluation_mode(probe.model), torch.no_grad(), probe.watch(try_all):
        run_each(run, batches, total=len(batches), description="comparing compensations")
    errors = [0.0] * len(trials)
    for site, numbers in by_site.items():
        for number, error in zip(numbers, found.means(site, len(numbers)), strict=True):
            errors[number] = error
    return errors


def _mask(x: torch.Tensor, trial: Trial, zeros: float, importance: torch.Tensor) -> torch.Tensor:
    if zeros <= 0:
        return x

    def mask(centred: torch.Tensor) -> torch.Tensor:
        estimator = PooledQuantile((zeros,), importance)
        estimator.update(centred)
        return estimator.mask_batch(centred, zeros)

    return trial.compensation.apply(x, mask)

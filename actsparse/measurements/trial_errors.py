"""How far the outputs of a site's layers move when what they read is masked in one way or another."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actsparse.algorithms import Trial
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.calibration import blame_layer, evaluation_mode, run_each, run_model
from actsparse.measurements.output_moves import OutputMoves
from actsparse.measurements.probe import Probe


def measure_trial_errors(probe: Probe, trials: Sequence[Trial], importance: Mapping[str, torch.Tensor]) -> list[float]:
    """
    Mask one site in several ways, each sequence at its own quantile, all other sites dense.

    :param probe: The model.
    :param trials: What to try.
    :param importance: a of each site.
    :return: For each trial the mean over the first `PROBE_TOKENS` tokens of ‖what the outputs move by‖ / ‖outputs‖,
        over all the site's layers and without biases.
    """
    by_site: dict[str, list[int]] = {}
    for number, trial in enumerate(trials):
        by_site.setdefault(trial.site, []).append(number)
    moves = OutputMoves()
    is_inside = False

    def try_all(name: str, x: torch.Tensor) -> torch.Tensor:
        nonlocal is_inside
        site = probe.sparsifiers[name].site
        if is_inside or site not in by_site:
            return x
        is_inside = True
        layer = probe.model.get_submodule(name)
        nothing = layer(torch.zeros_like(x[..., :1, :]))
        moved = []
        for number in by_site[site]:
            with blame_layer(name):
                left = x - _mask(x, trials[number], trials[number].zeros[name], importance[site])
            moved.append(layer(left) - nothing)
        moves.add(site, layer(x) - nothing, moved)
        is_inside = False
        return x

    def run(batch: Any) -> None:
        run_model(probe.model, batch)
        moves.end_batch()

    batches = probe.first_batches
    with evaluation_mode(probe.model), torch.no_grad(), probe.watch(try_all):
        run_each(run, batches, total=len(batches), description="comparing stand-ins")
    errors = [0.0] * len(trials)
    for site, numbers in by_site.items():
        for number, error in zip(numbers, moves.means(site, len(numbers)), strict=True):
            errors[number] = error
    return errors


def _mask(x: torch.Tensor, trial: Trial, zeros: float, importance: torch.Tensor) -> torch.Tensor:
    if zeros <= 0:
        return x

    def mask(centred: torch.Tensor) -> torch.Tensor:
        estimator = PooledQuantile((zeros,), importance)
        estimator.update(centred)
        return estimator.mask_batch(centred, zeros)

    return trial.stand_in.fill(x, mask)

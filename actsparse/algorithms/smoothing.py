"""Noisy figures of groups, drawn towards those of groups alike: of one role, or near each other in depth."""

from collections.abc import Sequence

import torch

from actsparse.algorithms.groups import LayerGroup

# How much of what groups differ by is common to a role, to a depth, to a role at a depth, and a group's own.
BY_ROLE, BY_DEPTH, BY_BOTH, OWN = 0.27, 0.18, 0.27, 0.27
# Parts that lie so far apart, as a share of the model's depth, have little in common.
DEPTH_SCALE = 0.25
# How far a group's figure may be expected to lie from the usual one: variance of their ratio.
VARIANCE = 0.3
# What noise is held to be where the data cannot tell: beside the usual figure.
LEAST_ERROR = 0.05
# The share of the trials' variance about the common slope that is taken for noise.
NOISE_SHARE = 0.72


def make_covariance(groups: Sequence[LayerGroup]) -> torch.Tensor:
    """
    Say how much figures of groups have in common before anything is measured.

    :return: Correlations, [groups, groups].
    """
    names = {role: number for number, role in enumerate(dict.fromkeys(group.role for group in groups))}
    roles = torch.tensor([names[group.role] for group in groups])
    depth = torch.arange(len(groups), dtype=torch.float64) / max(len(groups) - 1, 1)
    same = (roles[:, None] == roles).double()
    near = (-((depth[:, None] - depth) / DEPTH_SCALE).square()).exp()
    own = torch.eye(len(groups), dtype=torch.float64)
    return BY_ROLE * same + BY_DEPTH * near + BY_BOTH * same * near + OWN * own


def smooth(groups: Sequence[LayerGroup], values: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """
    Estimate figures from noisy measurements: the mean of a Gaussian process behind them.

    :param values: What was measured of each, in any unit, [groups].
    :param errors: Its standard error, in the same unit; infinite for what could not be measured.
    :return: The figures beside the usual one, which is 1, [groups]. They may be negative.
    """
    known = errors.isfinite()
    if not known.any():
        return torch.ones_like(values)
    covariance = VARIANCE * make_covariance(groups)
    values, errors = values[known], errors[known]
    ones = torch.ones_like(values)
    usual = size = values.abs().median().clamp(min=1e-300)
    # The usual figure is the mean weighted by how well each is known, which depends on the usual figure.
    for _ in range(10):
        noise = torch.diag((errors / usual).square() + LEAST_ERROR**2)
        weights = torch.linalg.solve(covariance[known][:, known] + noise, ones)
        usual = (weights @ values / weights.sum()).clamp(min=0.1 * size)
    noise = torch.diag((errors / usual).square() + LEAST_ERROR**2)
    deviations = torch.linalg.solve(covariance[known][:, known] + noise, values / usual - 1)
    return 1 + covariance[:, known] @ deviations


def regress(
    groups: Sequence[LayerGroup], moved: torch.Tensor, found: torch.Tensor, trial_groups: torch.Tensor
) -> torch.Tensor:
    """
    Estimate from trials that move all groups at once what moving each of them does.

    :param moved: How far each trial moves each group, [trials, groups].
    :param found: What came out, [trials].
    :param trial_groups: Trials that may be compared with each other, by number, [trials].
    :return: What a group's move by 1 does beside the usual group's, which is 1, [groups]. It may be negative.
    """
    moved, found = moved.clone(), found.clone()
    for group in trial_groups.unique():
        inside = trial_groups == group
        moved[inside] -= moved[inside].mean(0)
        found[inside] -= found[inside].mean()
    together = moved.sum(1)
    slope = (together @ found) / (together @ together).clamp(min=1e-300)
    if slope <= 0:
        # More sparsity made nothing worse: there is nothing to tell groups apart by.
        return torch.ones(len(groups), dtype=torch.float64)
    rest = found - slope * together
    # Most of what the common slope leaves is noise: a trial sees some hundred tokens.
    noise = (NOISE_SHARE * rest.square().mean()).clamp(min=1e-12)
    covariance = VARIANCE * slope.square() * make_covariance(groups)
    seen = moved @ covariance @ moved.T + noise * torch.eye(len(rest), dtype=torch.float64)
    return 1 + covariance @ moved.T @ torch.linalg.solve(seen, rest) / slope

"""The greedy allocation of TEAL (arXiv 2408.14690): block by block, the cheapest raise first."""

from collections.abc import Mapping
from functools import partial

import torch

from actsparse.algorithms.cache import name_measurement
from actsparse.algorithms.groups import Scopes
from actsparse.algorithms.measurements import Block, Measurements

# How much sparser a layer with the block's mean size becomes at a time.
STEP = 0.05


def greedy(scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """
    Raise the sparsity of one layer at a time, in each block on its own, until the block meets the target.

    Each raise saves about the same share of the block's weights: a layer of few weights is raised by more. Of all
    layers, the one is raised whose raise leaves the block's output nearest to the dense one's. Layers that read one
    tensor are raised apart, as in TEAL. The way to one target is part of the way to a higher one, and is remembered.

    :param scopes: Target sparsity and groups of each scope; what each block is to reach by weight bytes.
    """
    sparsity: dict[str, float] = {}
    for target, groups in scopes:
        sizes = {name: size for group in groups for name, size in zip(group.layers, group.layer_bytes, strict=True)}
        for block in model.blocks(sizes, importance):
            sparsity |= _raise_block(model, block, {name: sizes[name] for name in block.layers}, target)
    return sparsity


def _raise_block(model: Measurements, block: Block, sizes: dict[str, float], target: float) -> dict[str, float]:
    sparsity = dict.fromkeys(sizes, 0.0)
    total = sum(sizes.values())
    step = STEP * total / len(sizes)  # bytes
    left = target * total
    number = 0
    while left > 1e-9 * total:
        raises = {name: min(1.0, sparsity[name] + step / sizes[name]) for name in sizes if sparsity[name] < 1.0}
        name = name_measurement("raise", tuple(sizes), number)
        best = model.get_or_measure(name, partial(_choose, block, dict(sparsity), raises))
        # The last raise is as large as what is left.
        raised = min(raises[best], sparsity[best] + left / sizes[best])
        left -= (raised - sparsity[best]) * sizes[best]
        sparsity[best] = raised
        number += 1
    return sparsity


def _choose(block: Block, sparsity: dict[str, float], raises: dict[str, float]) -> str:
    errors = {name: block.error({**sparsity, name: value}) for name, value in raises.items()}
    return min(errors, key=errors.__getitem__)

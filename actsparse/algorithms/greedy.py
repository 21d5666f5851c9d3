"""The greedy allocation of TEAL (arXiv 2408.14690): block by block, the cheapest raise first."""

from collections.abc import Mapping

import torch

from actsparse.algorithms.measurements import Block, Measurements
from actsparse.algorithms.parts import Scopes

# How much sparser a layer with the block's mean size becomes at a time.
STEP = 0.05


# The raises of a block in their order: a layer, its sparsity before and after.
Path = list[tuple[str, float, float]]


def greedy(scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """
    Raise the sparsity of one layer at a time, in each block on its own, until the block meets the target.

    Each raise saves about the same share of the block's weights: a layer of few weights is raised by more. Of all
    layers, the one is raised whose raise leaves the block's output nearest to the dense one's. Layers that read one
    tensor are raised apart, as in TEAL. The way to one target is part of the way to a higher one, and is remembered.

    :param scopes: Target sparsity and parts of each scope; what each block is to reach by weight bytes.
    :param model: The model.
    :param importance: a of each site.
    :return: The sparsity of each layer.
    """
    sparsity: dict[str, float] = {}
    for target, parts in scopes:
        sizes = {name: size for part in parts for name, size in zip(part.layers, part.layer_bytes, strict=True)}
        for block in model.blocks(sizes, importance):
            path: Path = model.once(("greedy", tuple(sizes), block.layers), list)
            sparsity |= _raise_block(block, {name: sizes[name] for name in block.layers}, target, path)
    return sparsity


def _raise_block(block: Block, sizes: dict[str, float], target: float, path: Path) -> dict[str, float]:
    sparsity = dict.fromkeys(sizes, 0.0)
    total = sum(sizes.values())
    step = STEP * total / len(sizes)  # bytes
    left = target * total
    for number in range(len(sizes) * (1 + int(1 / STEP))):
        if left <= 1e-9 * total:
            break
        if number == len(path):
            raised = {name: min(1.0, sparsity[name] + step / sizes[name]) for name in sizes if sparsity[name] < 1.0}
            errors = {name: block.error({**sparsity, name: value}) for name, value in raised.items()}
            best = min(errors, key=errors.__getitem__)
            path.append((best, sparsity[best], raised[best]))
        name, before, after = path[number]
        # The last raise is as large as what is left.
        sparsity[name] = min(after, before + left / sizes[name])
        left -= (sparsity[name] - before) * sizes[name]
    return sparsity

"""The texts once more, with units switched off."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from actsparse.commands.studies.attribution.decoding import Decoding
from actsparse.commands.studies.attribution.masks import Masks
from actsparse.commands.studies.attribution.recording import Advance, Recording
from actsparse.commands.studies.units import UnitLayer


@dataclass(frozen=True)
class Replay:
    """
    What the masked model makes of the prompts.

    :param tokens: What it generates, free to go its own way, [tokens, texts].
    :param divergence: KL(dense ‖ masked) where it is fed the dense model's text, summed over tokens, nats, [texts].
    :param agreement: For how many tokens of that text both predict the same one, [texts].
    :param sparsity: The share of weights, of all attention and feed-forward networks, that what is off makes useless.
    """

    tokens: torch.Tensor
    divergence: torch.Tensor
    agreement: torch.Tensor
    sparsity: float


def replay(
    decoding: Decoding, recording: Recording, layers: Mapping[str, UnitLayer], masks: Masks, advance: Advance
) -> Replay:
    """
    Generate with masks, from the first token on; the prompts are read without.

    Each text runs twice, next to itself: once free, once fed the dense model's tokens.

    :param decoding: The model at the ends of its prompts; not changed.
    """
    decoding = decoding.repeat(2)
    off = total = 0.0
    all_parameters = sum(layer.parameters for layer in layers.values())
    free_tokens = []
    divergence = torch.zeros_like(recording.labels[0], dtype=torch.float64)
    agreement = torch.zeros_like(divergence)
    for step, (labels, is_label) in enumerate(zip(recording.labels, recording.is_label, strict=True)):
        counts = is_label.repeat_interleave(2)

        def leave_out(name: str, x: torch.Tensor, step: int = step, counts: torch.Tensor = counts) -> torch.Tensor:
            nonlocal off
            keep = masks(step, name, x)
            if keep is None:
                return x
            off += layers[name].parameters * float((~keep[counts]).float().mean(-1).sum())
            return x * keep

        total += all_parameters * int(counts.sum())
        with torch.no_grad():
            logits, decoding = decoding.step(leave_out)
        free, fed = logits.unflatten(0, (-1, 2)).unbind(1)
        expected = recording.log_probabilities[step]
        moved = F.kl_div(fed.log_softmax(-1), expected, reduction="none", log_target=True).sum(-1)
        divergence += moved.double() * is_label
        agreement += (fed.argmax(-1) == labels).double() * is_label
        free_tokens.append(free.argmax(-1))
        decoding = decoding.go_on(torch.stack([free_tokens[-1], labels], dim=1).flatten())
        advance(1)
    return Replay(torch.stack(free_tokens), divergence, agreement, off / total)

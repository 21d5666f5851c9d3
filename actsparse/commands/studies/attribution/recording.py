"""What the dense model generates, and what its units put out for each token of that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from actsparse.commands.studies.attribution.decoding import Decoding
from actsparse.commands.studies.attribution.metrics import INTEGRATED, METRICS
from actsparse.commands.studies.units import UnitLayer
from actsparse.torch.insertion import watch_gradient

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Recording:
    """
    What the dense model generated, token by token.

    :param labels: Its greedy choices, [tokens, texts].
    :param is_label: Which of them belong to the text: those up to its end, [tokens, texts].
    :param log_probabilities: What it expected, [tokens, texts, vocabulary].
    :param outputs: o of each layer, [tokens, texts, channels].
    :param gradients: Of the loss of the very token generated, by o, [tokens, texts, channels].
    :param integrated: The same, averaged along the path from no output of the layer to its whole output; empty unless
        asked for.
    """

    labels: torch.Tensor
    is_label: torch.Tensor
    log_probabilities: torch.Tensor
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    integrated: dict[str, torch.Tensor]

    def score(self, metric: str, layer: UnitLayer) -> torch.Tensor:
        """
        Compute a metric.

        :param metric: A name of `METRICS`.
        :return: What each unit is worth, [tokens, texts, units].
        """
        gradients = self.integrated if metric == INTEGRATED else self.gradients
        return METRICS[metric](layer.split(self.outputs[layer.name]), layer.split(gradients[layer.name]))


def record(
    decoding: Decoding, *, ends: Sequence[int], most: int, ig_steps: int | None = None, advance: Advance
) -> Recording:
    """
    Generate greedily, and take the gradient of each token's loss by what the units put out at that token.

    :param decoding: The model at the ends of its prompts; not changed.
    :param ig_steps: In how many steps to integrate gradients; None leaves that out.
    """
    decoding = decoding.repeat(1)
    is_going = torch.ones_like(decoding.tokens, dtype=torch.bool)
    steps: list[tuple[torch.Tensor, ...]] = []
    seen: list[tuple[dict[str, torch.Tensor], ...]] = []
    for _ in range(most):
        paths = decoding.repeat(ig_steps) if ig_steps else None
        loss, logits, outputs, decoding = see_outputs(decoding)
        labels = logits.detach().argmax(-1)
        gradients = dict(zip(outputs, torch.autograd.grad(loss(labels), list(outputs.values())), strict=True))
        outputs = {name: o.detach() for name, o in outputs.items()}
        integrated = {}
        if paths is not None and ig_steps:
            for name in outputs:
                integrated[name] = _integrate(paths, name, ig_steps, labels)
                advance(1)
        seen.append(tuple({n: x[:, 0] for n, x in part.items()} for part in (outputs, gradients, integrated)))
        steps.append((labels, is_going, logits.detach().log_softmax(-1)))
        is_going = is_going & ~torch.isin(labels, torch.tensor(list(ends), dtype=labels.dtype, device=labels.device))
        decoding = decoding.go_on(labels)
        advance(1)
        if not is_going.any():
            break
    labels, is_label, log_probabilities = (torch.stack(part) for part in zip(*steps, strict=True))
    outputs, gradients, integrated = (
        {name: torch.stack([x[name] for x in part]) for name in part[0]} for part in zip(*seen, strict=True)
    )
    return Recording(labels, is_label, log_probabilities, outputs, gradients, integrated)


def see_outputs(
    decoding: Decoding,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, dict[str, torch.Tensor], Decoding]:
    """
    Read one token, and get ready for gradients by what the units put out at it.

    :return: The loss as a function of the labels, [texts]; logits; o of each layer, [texts, 1, channels]; the texts one
        token further.
    """
    outputs: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> torch.Tensor:
        outputs[name] = watch_gradient(x)
        return outputs[name]

    with torch.enable_grad():
        logits, further = decoding.step(see)
    # The texts do not see each other: the gradient of the sum is each one's own.
    return lambda labels: F.cross_entropy(logits, labels, reduction="sum"), logits, outputs, further


def _integrate(paths: Decoding, layer: str, steps: int, labels: torch.Tensor) -> torch.Tensor:
    """Average the gradient at k/n of one layer's output, k = 1 … n; [texts, 1, channels]."""
    texts = len(labels)
    scales = (torch.arange(1, steps + 1, device=labels.device) / steps).repeat(texts)[:, None, None]
    scaled: list[torch.Tensor] = []

    def scale(name: str, x: torch.Tensor) -> torch.Tensor:
        if name != layer:
            return x
        scaled.append((x.detach() * scales).requires_grad_())
        return scaled[0]

    length = paths.attended.shape[1]
    with torch.enable_grad():
        logits, _ = paths.step(scale)
        loss = F.cross_entropy(logits, labels.repeat_interleave(steps), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, scaled)
    # The next layer starts from the same tokens.
    paths.cache.crop(length)
    return gradient.unflatten(0, (texts, steps)).mean(1)

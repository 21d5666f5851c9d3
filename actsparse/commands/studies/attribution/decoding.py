"""Decoding token by token, for several prompts at once, with what the units put out seen and replaced."""

import copy
import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from actsparse.errors import ActsparseError
from actsparse.torch.insertion import intercept_inputs

# Called with a layer's name and what it reads, [prompts, 1, channels]; gives what it shall read.
Intercept = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Decoding:
    """
    A model in the middle of some texts.

    :param cache: Keys and values of the tokens before; it belongs to this object alone.
    :param attended: 1 for each token before, 0 for padding, [prompts, tokens].
    :param tokens: The token to go on from, [prompts].
    """

    model: nn.Module
    layers: Collection[str]
    cache: Any
    attended: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def begin(cls, model: nn.Module, layers: Collection[str], prompts: Sequence[Sequence[int]]) -> "Decoding":
        """
        Read prompts, all but the last token of each.

        :return: The model about to read the last tokens: what these make it predict is generated.
        """
        longest, device = max(map(len, prompts)), next(model.parameters()).device
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        attended = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
        with torch.no_grad():
            output = _run(model, ids[:, :-1], attended[:, :-1], None)
        cache = getattr(output, "past_key_values", None)
        if cache is None or not hasattr(cache, "layers") or not all(hasattr(x, "keys") for x in cache.layers):
            msg = f"{type(model).__name__} keeps no keys and values of earlier tokens: it cannot go on from them"
            raise ActsparseError(msg)
        return cls(model, layers, cache, attended[:, :-1], ids[:, -1])

    def repeat(self, times: int) -> "Decoding":
        """Copy every text."""
        cache = copy.deepcopy(self.cache)
        if times > 1:
            cache.batch_repeat_interleave(times)
        attended, tokens = (x.repeat_interleave(times, dim=0) for x in (self.attended, self.tokens))
        return replace(self, cache=cache, attended=attended, tokens=tokens)

    def step(self, intercept: Intercept) -> tuple[torch.Tensor, "Decoding"]:
        """
        Read the token to go on from. Gradients flow where they are enabled, but not into the tokens before.

        :return: Logits, [prompts, vocabulary], and the texts one token further, of which the next token is still to be
            set by `go_on`. Its cache is this object's, which is of no more use.
        """
        attended = torch.cat([self.attended, torch.ones_like(self.attended[:, :1])], dim=1)
        with intercept_inputs(self.model, self.layers, intercept):
            logits = _run(self.model, self.tokens[:, None], attended, self.cache).logits[:, -1].float()
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return logits, replace(self, attended=attended)

    def go_on(self, tokens: torch.Tensor) -> "Decoding":
        """
        Choose the next tokens.

        :param tokens: One for each text, [prompts].
        """
        return replace(self, tokens=tokens)


def _run(model: nn.Module, ids: torch.Tensor, attended: torch.Tensor, cache: Any) -> Any:
    positions = (attended.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    known = inspect.signature(model.forward).parameters
    optional = {"position_ids": positions, "logits_to_keep": 1}
    return model(
        input_ids=ids,
        attention_mask=attended,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in optional.items() if name in known},
    )

"""The mask: one threshold buffer, and zeros where the magnitude does not exceed it."""

from collections.abc import Callable

import torch
from torch import nn

TOKENS = ("all", "decode")


class ActivationSparsifier(nn.Module):
    """
    Zero the entries of a tensor whose magnitude does not exceed the threshold.

    The threshold is minus infinity, which masks nothing, until something is copied into it.

    :param target_sparsity: The share of zeros asked for, in [0, 1].
    :param channels: Number of input channels for one threshold per channel, or None for a single one.
    :param tokens: ``all`` masks every token, ``decode`` only forwards of a single new token.
    :param roles: What the layer does in its block, for reports.
    :param site: Name of the site whose input this masks.
    :param algorithm: Name of the algorithm that sets the threshold.
    :param rows_of: For a mask on the output of an activation function: the layer whose outputs that multiplies, so that
        a zero makes a row of its weights useless. Empty for a mask on a layer's own input.
    :param skip_first: How many tokens at the start of each forward of several tokens pass unmasked.
    """

    def __init__(
        self,
        target_sparsity: float,
        *,
        channels: int | None = None,
        tokens: str = "all",
        roles: tuple[str, ...] = (),
        site: str = "",
        algorithm: str = "",
        rows_of: str = "",
        skip_first: int = 0,
    ) -> None:
        super().__init__()
        self.threshold: torch.Tensor
        self.register_buffer("threshold", torch.full(() if channels is None else (channels,), -torch.inf))
        self.target_sparsity = target_sparsity
        self.tokens = tokens
        self.roles = roles
        self.site = site
        self.algorithm = algorithm
        self.rows_of = rows_of
        self.skip_first = skip_first
        self.is_active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Mask a layer's input, or an activation function's output.

        :param x: Activations, [..., tokens, channels].
        :return: The same tensor with zeros where ``|x| <= threshold``.
        """
        if not self.is_active or (self.tokens == "decode" and x.shape[-2] != 1):
            return x
        return self.mask_rest(x, lambda rest: mask_small(rest, self.threshold))

    def mask_rest(self, x: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Let the first tokens pass, and mask the rest.

        :param x: Activations, [..., tokens, channels].
        :param mask: Masks the rest.
        :return: What the layer gets.
        """
        if not self.skip_first or x.shape[-2] == 1:
            return mask(x)
        first, rest = x[..., : self.skip_first, :], x[..., self.skip_first :, :]
        return torch.cat([first, mask(rest)], dim=-2) if rest.shape[-2] else x

    def set_threshold(self, threshold: torch.Tensor) -> None:
        """
        Replace the threshold, by one of another shape if need be.

        :param threshold: The threshold, 0-d or [in_features].
        """
        self.threshold = threshold.to(self.threshold.device, self.threshold.dtype).clone()

    def extra_repr(self) -> str:
        """
        Describe the mask when its model is printed.

        :return: The settings that matter.
        """
        return f"target_sparsity={self.target_sparsity}, tokens={self.tokens!r}, algorithm={self.algorithm!r}"


def mask_small(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """
    Zero the entries whose magnitude does not exceed a threshold.

    :param x: Activations, [..., tokens, in_features].
    :param threshold: One threshold, 0-d, or one per channel, [in_features]; taken in the activations' own type.
    :return: The activations with zeros where ``|x| <= threshold``.
    """
    threshold = threshold.to(x.dtype)
    if threshold.ndim == 0 and threshold.device.type == "cpu" and not _is_traced():
        # The same comparison in one pass over memory instead of three; reading the scalar is free on the CPU only.
        return nn.functional.hardshrink(x, threshold.item())
    return torch.where(torch.le(x.abs(), threshold), torch.zeros((), dtype=x.dtype, device=x.device), x)


def _is_traced() -> bool:
    # A traced graph must read the buffer and keep Abs, LessEqual and Select, which runtimes recognise.
    return torch.compiler.is_compiling() or torch.jit.is_tracing()

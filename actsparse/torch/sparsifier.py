"""The mask as a module: one threshold buffer, and zeros where the magnitude does not exceed it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actsparse.mask import LARGEST, NO_COMPENSATION, Compensation, Mask, mask_small


class ActivationSparsifier(nn.Module):
    """
    Zero the entries of a tensor whose magnitude does not exceed the threshold.

    The threshold is minus infinity, which masks nothing, until something is copied into it. What is left out becomes
    zero unless the mask is given a `Compensation` for it.

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
        self.shift: torch.Tensor | None
        self.basis: torch.Tensor | None
        self.bias: torch.Tensor | None
        self.register_buffer("threshold", torch.full(() if channels is None else (channels,), -torch.inf))
        self.register_buffer("shift", None)
        self.register_buffer("basis", None)
        self.register_buffer("bias", None)
        self.target_sparsity = target_sparsity
        # What the allocation makes of the target.
        self.allocated_sparsity = target_sparsity
        self.tokens = tokens
        self.roles = roles
        self.site = site
        self.algorithm = algorithm
        self.rows_of = rows_of
        self.skip_first = skip_first
        # What was tried and chosen when the threshold was calibrated, by an algorithm that chooses.
        self.selection: dict[str, Any] | None = None
        self.is_active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Mask a layer's input, or an activation function's output.

        :param x: Activations, [..., tokens, channels].
        :return: The same tensor with zeros, or their compensation, where ``|x| <= threshold``.
        """
        if not self.masks(x):
            return x
        return self.mask_rest(x, lambda rest: mask_small(rest, self.threshold))

    def mask_rest(self, x: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Let the first tokens pass, and mask the rest.

        :param x: Activations, [..., tokens, channels].
        :param mask: Puts zeros into the rest, from which a shift is subtracted before.
        """
        if not self.skip_first or x.shape[-2] == 1:
            return self.compensation.apply(x, mask)
        first, rest = x[..., : self.skip_first, :], x[..., self.skip_first :, :]
        return torch.cat([first, self.compensation.apply(rest, mask)], dim=-2) if rest.shape[-2] else x

    def count_zeros(self, x: torch.Tensor, output: torch.Tensor) -> int:
        """
        Count the entries of a layer's input that its weights need not be read for.

        :return: The number of zeros, those included that are compensated for.
        """
        if self.compensation == NO_COMPENSATION:
            return output.numel() - int(torch.count_nonzero(output))
        zeros = 0

        def mask(rest: torch.Tensor) -> torch.Tensor:
            nonlocal zeros
            kept = mask_small(rest, self.threshold)
            zeros += kept.numel() - int(torch.count_nonzero(kept))
            return kept

        if self.masks(x):
            self.mask_rest(x, mask)
        return zeros

    def masks(self, x: torch.Tensor) -> bool:
        """
        Tell whether a tensor is masked at all.

        :param x: Activations, [..., tokens, channels].
        :return: Whether the mask is active, on tokens such as these.
        """
        return self.is_active and (self.tokens != "decode" or x.shape[-2] == 1)

    @property
    def compensation(self) -> Compensation:
        """What the layer gets in the place of what is left out."""
        return Compensation(self.shift, self.basis, self.bias)

    def set_compensation(self, compensation: Compensation) -> None:
        """Give the layer something else than zeros in the place of what is left out."""
        copied = compensation.to(self.threshold.device)
        self.shift, self.basis, self.bias = copied.tensors

    def set_threshold(self, threshold: torch.Tensor) -> None:
        """
        Replace the threshold, by one of another shape if need be.

        :param threshold: The threshold, 0-d or [in_features].
        """
        self.threshold = threshold.to(self.threshold.device, self.threshold.dtype).clone()

    @classmethod
    def of(cls, mask: Mask, layer: str) -> "ActivationSparsifier":
        """Carry a mask."""
        sparsifier = cls(
            mask.target_sparsity or 0.0,
            tokens=mask.tokens,
            roles=mask.roles,
            site=mask.site,
            algorithm=mask.algorithm,
            rows_of=layer if mask.is_of_rows else "",
            skip_first=mask.skip_first,
        )
        sparsifier.allocated_sparsity = mask.allocation or 0.0
        sparsifier.set_threshold(mask.threshold)
        sparsifier.set_compensation(mask.compensation)
        sparsifier.selection = mask.selection
        return sparsifier

    def to_mask(self, place: str) -> Mask:
        """
        Tell what is carried.

        :return: The mask, on the CPU and in f32 whatever the model was cast to.
        """
        threshold = self.threshold.detach().to("cpu", torch.float32, copy=True).contiguous()
        return Mask(
            # A model cast to a smaller type after calibration has infinity for channels that never pass.
            threshold.clamp(max=LARGEST) if threshold.ndim else threshold,
            self.target_sparsity,
            self.allocated_sparsity,
            self.tokens,
            self.algorithm,
            self.site,
            self.roles,
            bool(self.rows_of),
            place if self.rows_of else "",
            self.skip_first,
            self.compensation.to("cpu"),
            self.selection,
        )

    def extra_repr(self) -> str:
        """Describe the mask when its model is printed."""
        return f"target_sparsity={self.target_sparsity}, tokens={self.tokens!r}, algorithm={self.algorithm!r}"

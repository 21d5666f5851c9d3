"""The mask: which entries of a layer's input count as zero, and what the layer gets in their place."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

TOKENS = ("all", "decode")
# The algorithm that tries several and chooses.
AUTO = "auto"
# The threshold of a channel that never passes: a number, as files hold, which smaller types round to infinity.
LARGEST = torch.finfo(torch.float32).max
# A low-rank part is stored in half precision at best: INT8 would round it as coarsely as the weights it repairs.
LEAST_BYTES = 2.0


@dataclass(frozen=True, eq=False)
class Compensation:
    """
    What a layer gets in the place of what its mask leaves out: zeros by default, or an approximation.

    :param shift: What is left out is what is close to this value, 0-d, and the layer gets this value in its place.
    :param basis: Orthonormal directions, [channels, rank]: the layer gets the part along them of what is left out.
        With the leading right singular vectors V of its weights that is the rank's best approximation of W:
        W V Vᵀ = U S Vᵀ.
    :param bias: What the layer gets besides, whatever the token, [channels]: W times it is a bias of the layer. The
        mean of what is left out is the least that can be put there (SPON, arXiv 2512.12744).
    """

    shift: torch.Tensor | None = None
    basis: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Shift, basis and bias."""
        return self.shift, self.basis, self.bias

    @property
    def rank(self) -> int:
        """How many directions there are; 0 without a basis."""
        return 0 if self.basis is None else self.basis.shape[1]

    def to(self, device: torch.device | str) -> "Compensation":
        """
        Copy the tensors to a device, in f32.

        :param device: The device.
        :return: The compensation there.
        """

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            # Another order in memory would be another order of sums.
            return tensor.detach().to(device, torch.float32).clone(memory_format=torch.contiguous_format)

        return Compensation(*map(move, self.tensors))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compensation) and self._to_bytes() == other._to_bytes()

    def __hash__(self) -> int:
        return hash(self._to_bytes())

    def _to_bytes(self) -> bytes:
        return b"|".join(b"" if tensor is None else tensor.cpu().numpy().tobytes() for tensor in self.tensors)

    def apply(self, x: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Mask, and compensate for what is left out.

        :param x: Activations, [..., channels].
        :param mask: Puts zeros where entries are left out.
        :return: What the layer gets.
        """
        if self.shift is not None:
            x = x - self.shift.to(x)
        kept = mask(x)
        if self.basis is not None:
            basis = self.basis.to(x)
            # Not as a product of matrices: `nncf.compress_weights` would take the basis for a layer's weight.
            kept = kept + torch.einsum("...r,cr->...c", torch.einsum("...c,cr->...r", x - kept, basis), basis)
        if self.bias is not None:
            kept = kept + self.bias.to(x)
        return kept if self.shift is None else kept + self.shift.to(x)

    def reads(self, inputs: int, outputs: int, weight_bytes: float) -> float:
        """
        Tell what has to be read for the compensation.

        :param inputs: Input channels of the layers.
        :param outputs: Output channels, of all layers together that read the same tensor.
        :param weight_bytes: The size of their weights.
        :return: What is read for each token, as a share of the weights.
        """
        return reads_of_rank(self.rank, inputs, outputs, weight_bytes)


NO_COMPENSATION = Compensation()


def reads_of_rank(rank: int, inputs: int, outputs: int, weight_bytes: float) -> float:
    """
    Tell what has to be read for a low-rank part.

    :param rank: Its rank.
    :param inputs: Input channels of the layers.
    :param outputs: Output channels, of all layers together that read the same tensor.
    :param weight_bytes: The size of their weights.
    :return: What is read for each token, as a share of the weights.
    """
    of_one_number = max(LEAST_BYTES, weight_bytes / (inputs * outputs))
    return rank * (inputs + outputs) * of_one_number / weight_bytes


@dataclass(frozen=True, eq=False)
class Mask:
    """
    What masks one layer, whatever carries it: a module of torch, or a Select of an OpenVINO model.

    :param threshold: Where ``|x| <= threshold``, x counts as zero; f32, 0-d or [channels].
    :param target_sparsity: The share of zeros asked for; None where a converted model does not say how it was masked.
    :param allocated_sparsity: The share that the allocation gave this layer; None where it is the target.
    :param tokens: Which tokens are masked, ``all`` or ``decode``.
    :param algorithm: The algorithm that found the threshold.
    :param site: Name of the site whose input is masked.
    :param roles: What the layer does in its block.
    :param is_of_rows: Whether what the layer's output is multiplied by is masked, which makes rows of its weights
        useless, and not its input.
    :param gate_function: For a mask of rows, the activation function whose output is masked, where it is known.
    :param skip_first: How many tokens at the start of each forward of several tokens pass unmasked.
    :param compensation: What the layer gets in the place of what is left out.
    :param selection: What was tried and chosen when the threshold was calibrated, by an algorithm that chooses.
    """

    threshold: torch.Tensor
    target_sparsity: float | None = None
    allocated_sparsity: float | None = None
    tokens: str = "all"
    algorithm: str = ""
    site: str = ""
    roles: tuple[str, ...] = ()
    is_of_rows: bool = False
    gate_function: str = ""
    skip_first: int = 0
    compensation: Compensation = NO_COMPENSATION
    selection: dict[str, Any] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self._to_key() == other._to_key()

    def __hash__(self) -> int:
        return hash(self._to_key()[0])

    def _to_key(self) -> tuple[Any, ...]:
        threshold = self.threshold.detach().cpu()
        return (threshold.numpy().tobytes(), threshold.shape, self.to_record(), self.is_of_rows, self.compensation)

    def to_record(self) -> dict[str, Any]:
        """
        Turn all but the tensors into what JSON can hold.

        :return: The record, which `from_record` reads.
        """
        record = {name: getattr(self, name) for name in _RECORDED}
        return {**record, "roles": list(self.roles), "allocated_sparsity": self.allocation}

    @classmethod
    def from_record(
        cls, threshold: torch.Tensor, record: Mapping[str, Any], compensation: Compensation = NO_COMPENSATION
    ) -> "Mask":
        """
        Make the mask that a record describes.

        :param threshold: Its threshold.
        :param record: What `to_record` gave, here or in an earlier version.
        :param compensation: What the layer gets in the place of what is left out.
        :return: The mask.
        :raises ValueError: If that is no record.
        """
        numbers = [record["target_sparsity"], record.get("allocated_sparsity", record["target_sparsity"])]
        texts = [record["algorithm"], record["site"], record.get("gate_function", ""), *record["roles"]]
        skip_first = record.get("skip_first", 0)
        is_valid = all(isinstance(x, float | int) and 0 <= x <= 1 for x in numbers)
        is_valid &= all(isinstance(text, str) for text in texts)
        is_valid &= isinstance(skip_first, int) and 0 <= skip_first < 2**31
        if not is_valid or record["tokens"] not in TOKENS or record.keys() - {*_RECORDED}:
            msg = "a mask's record is not one"
            raise ValueError(msg)
        known = {**record, "roles": tuple(record["roles"]), "is_of_rows": bool(record.get("gate_function", ""))}
        return cls(threshold, compensation=compensation, **known)

    def with_selection(self, selection: object) -> "Mask":
        """
        Add what was tried and chosen, which files keep once for all masks of a call.

        :param selection: What a file says of it.
        :return: The mask with it, if an algorithm that chooses has made it; the mask itself otherwise.
        """
        is_chosen = self.algorithm.startswith(AUTO) and isinstance(selection, dict)
        return replace(self, selection=selection) if is_chosen else self

    @property
    def allocation(self) -> float | None:
        """The share of zeros that the threshold was calibrated for."""
        return self.target_sparsity if self.allocated_sparsity is None else self.allocated_sparsity

    @property
    def can_be_saved(self) -> bool:
        """Whether the threshold is a number from 0 on, or minus infinity, and the rest is finite."""
        # NaN and plus infinity are not thresholds that data can give; nothing can compensate for a row whose gate is
        # closed.
        return (
            _is_threshold(self.threshold)
            and _has_form(self.compensation.shift, ndim=0)
            and _has_form(self.compensation.basis, ndim=2)
            and _has_form(self.compensation.bias, ndim=1)
            and not (self.is_of_rows and self.compensation != NO_COMPENSATION)
        )


# What a mask records besides its tensors.
_RECORDED = (
    "target_sparsity",
    "allocated_sparsity",
    "tokens",
    "algorithm",
    "site",
    "roles",
    "gate_function",
    "skip_first",
)


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


def _is_threshold(tensor: torch.Tensor) -> bool:
    if tensor.dtype != torch.float32 or tensor.ndim > 1 or tensor.numel() == 0:
        return False
    return bool(((tensor >= 0) | (tensor == -math.inf)).all() and (tensor < math.inf).all())


def _has_form(tensor: torch.Tensor | None, ndim: int) -> bool:
    if tensor is None:
        return True
    has_type = tensor.dtype == torch.float32 and tensor.ndim == ndim and tensor.numel() > 0
    return has_type and bool(tensor.isfinite().all())

"""What a layer gets in the place of the entries that its mask leaves out, where that is not zeros."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# A low-rank part is stored in half precision at best: INT8 would round it as coarsely as the weights it repairs.
LEAST_BYTES = 2.0


@dataclass(frozen=True, eq=False)
class StandIn:
    """
    What stands in for what is left out; nothing by default.

    :param shift: What is left out is what is close to this value, 0-d, and the layer gets this value in its place.
    :param basis: Orthonormal directions, [channels, rank]: the layer gets the part along them of what is left out.
        With the leading right singular vectors V of its weights that is the rank's best approximation of W:
        W V Vᵀ = U S Vᵀ.
    """

    shift: torch.Tensor | None = None
    basis: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """How many directions there are; 0 without a basis."""
        return 0 if self.basis is None else self.basis.shape[1]

    def to(self, device: torch.device | str) -> "StandIn":
        """
        Copy the tensors to a device, in f32.

        :param device: The device.
        :return: The stand-in there.
        """

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            # Another order in memory would be another order of sums.
            return tensor.detach().to(device, torch.float32).clone(memory_format=torch.contiguous_format)

        return StandIn(move(self.shift), move(self.basis))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StandIn) and self._to_bytes() == other._to_bytes()

    def __hash__(self) -> int:
        return hash(self._to_bytes())

    def _to_bytes(self) -> bytes:
        tensors = (self.shift, self.basis)
        return b"|".join(b"" if tensor is None else tensor.cpu().numpy().tobytes() for tensor in tensors)

    def fill(self, x: torch.Tensor, mask: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        Mask, and fill what is left out.

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
        return kept if self.shift is None else kept + self.shift.to(x)

    def reads(self, inputs: int, outputs: int, weight_bytes: float) -> float:
        """
        Tell what has to be read for it.

        :param inputs: Input channels of the layers.
        :param outputs: Output channels, of all layers together that read the same tensor.
        :param weight_bytes: The size of their weights.
        :return: What is read for each token, as a share of the weights.
        """
        return reads_of_rank(self.rank, inputs, outputs, weight_bytes)


NOTHING = StandIn()


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

"""What `tune` chooses among: weights, masks, and what runs them."""

from dataclasses import dataclass

OPENVINO, KERNEL = "OpenVINO", "actsparse"


@dataclass(frozen=True)
class Candidate:
    """
    One way to deploy a model.

    :param weights: How weights are stored, a name of `WEIGHTS`.
    :param engine: What runs its layers: `OPENVINO` as they are, or `KERNEL`.
    :param algorithm: What finds its masks; nothing for a model without masks.
    :param sparsity: Target of all Linear layers of the blocks.
    :param recover: Steps of training that give the masks their biases.
    """

    weights: str
    engine: str = OPENVINO
    algorithm: str = ""
    sparsity: float = 0.0
    recover: int = 0

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.algorithm:
            return f"{self.weights}, {self.algorithm} {self.sparsity:.1%}{', biases learnt' if self.recover else ''}"
        return f"{self.weights}, {'dense' if self.engine == OPENVINO else 'dense on the kernel'}"


# What every loss is compared with: the model's own weights, in half precision.
REFERENCE = Candidate("f16")


@dataclass(frozen=True)
class Speed:
    """
    How fast a candidate is, with the precision hint that is best for it.

    :param decode: Median milliseconds of a decoded token.
    :param first: Median milliseconds until the first token of a prompt.
    :param precision: The hint with which it decodes fastest.
    """

    decode: float
    first: float
    precision: str

    def at_pace(self, pace: float) -> "Speed":
        """
        Tell how fast it would have been at another minute.

        :param pace: How many times as long everything took then.
        """
        return Speed(self.decode * pace, self.first * pace, self.precision)

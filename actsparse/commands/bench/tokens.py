"""The tokens that a benchmark runs on."""

from dataclasses import dataclass

import numpy as np
import torch

from actsparse.commands.bench.prepare import DenseModel
from actsparse.texts import Text, token_batches

SEED = 1
CALIBRATION_LENGTH = 128


@dataclass(frozen=True)
class Tokens:
    """
    Tokens to calibrate with and to measure on.

    :param measured: [1, tokens]; prompts are its beginnings, and it is decoded token by token.
    """

    calibration: list[dict[str, torch.Tensor]]
    measured: np.ndarray
    source: str


def make_sequences(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """
    Make several sequences of one, for a batch: each begins elsewhere in it, and goes on at its beginning.

    :param tokens: [1, tokens].
    :return: [count, length].
    """
    total = tokens.shape[1]
    starts = np.arange(count) * total // count
    return tokens[0, (starts[:, None] + np.arange(length)) % total]


def make_random_tokens(vocabulary: int, *, num_batches: int, calibration_length: int, length: int) -> Tokens:
    """Make random tokens, for models that have no text; equal arguments give equal tokens."""
    generator = np.random.default_rng(SEED)
    measured = generator.integers(0, vocabulary, (1, length))
    batches = torch.from_numpy(generator.integers(0, vocabulary, (num_batches, 1, calibration_length)))
    calibration = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in batches]
    return Tokens(calibration, measured, "random")


def read_tokens(
    dense: DenseModel, text: Text, calibration: Text, *, num_batches: int, calibration_length: int, length: int
) -> Tokens:
    """
    Read tokens from texts.

    :raises ActsparseError: If a text is too short, or the tokenizer cannot be loaded.
    """
    tokenizer = dense.load_tokenizer()
    batches = token_batches(tokenizer, calibration, num_batches=num_batches, length=calibration_length)
    measured = token_batches(tokenizer, text, num_batches=1, length=length)[0]["input_ids"].numpy()
    return Tokens(batches, measured, f"{text.name}; calibrated with {calibration.name}")

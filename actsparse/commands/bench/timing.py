"""Time several models in one process, interleaved, so that a machine's drift meets all alike."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from rich.progress import Progress

from actsparse.commands.bench.decoder import Decoder
from actsparse.runtime.progress import shows_progress, status_console

Key = TypeVar("Key")


def time_decoding(
    decoders: Mapping[Key, Decoder], tokens: np.ndarray, *, num_prompt_tokens: int, num_discarded: int
) -> dict[Key, list[float]]:
    """
    Decode the same tokens with each model, turn by turn.

    :param decoders: The models.
    :param tokens: [sequences, tokens]; the sequences are decoded at once.
    :param num_prompt_tokens: How many of them are read first, untimed.
    :param num_discarded: How many decoded tokens are not counted: the first ones find nothing ready.
    :return: Milliseconds of each counted step, one token of every sequence, by model.
    """
    times: dict[Key, list[float]] = {key: [] for key in decoders}
    for decoder in decoders.values():
        decoder.start()
        decoder.feed(tokens[:, :num_prompt_tokens])
    with _undisturbed("timing tokens", tokens.shape[1] - num_prompt_tokens) as advance:
        for turn, i in enumerate(range(num_prompt_tokens, tokens.shape[1])):
            for key in _shuffle(list(decoders), turn):
                times[key].append(_time(decoders[key], tokens[:, i : i + 1]))
            advance()
    return {key: values[num_discarded:] for key, values in times.items()}


def time_first_token(
    decoders: Mapping[Key, Decoder], tokens: np.ndarray, lengths: tuple[int, ...], repetitions: int
) -> dict[int, dict[Key, list[float]]]:
    """
    Read prompts of several lengths with each model, turn by turn.

    :param decoders: The models.
    :param tokens: [1, tokens]; the prompts are its beginnings.
    :param lengths: How long the prompts are.
    :param repetitions: How often each is read.
    :return: Milliseconds until the first token's logits, by length and model.
    """
    times: dict[int, dict[Key, list[float]]] = {n: {key: [] for key in decoders} for n in lengths}
    with _undisturbed("timing prompts", len(lengths) * repetitions) as advance:
        for turn in range(repetitions):
            for length in lengths:
                for key in _shuffle(list(decoders), turn):
                    decoders[key].start()
                    times[length][key].append(_time(decoders[key], tokens[:, :length]))
                advance()
    return times


def _time(decoder: Decoder, tokens: np.ndarray) -> float:
    start = time.perf_counter()
    decoder.feed(tokens)
    return 1e3 * (time.perf_counter() - start)


def _shuffle(keys: list[Key], turn: int) -> list[Key]:
    """Let every model follow every other one: which one ran before decides what the caches hold."""
    return random.Random(turn).sample(keys, len(keys))


@contextmanager
def _undisturbed(description: str, total: int) -> Iterator[Callable[[], None]]:
    """
    Keep the garbage collector away, and show progress between measurements only: its own thread would take a core.

    :param description: What is being timed.
    :param total: How many steps there are.
    :return: A context with the function to call after each step.
    """
    progress = Progress(console=status_console(), transient=True, auto_refresh=False, disable=not shows_progress())
    task = progress.add_task(description, total=total)

    def advance() -> None:
        progress.advance(task)
        progress.refresh()

    gc.collect()
    gc.disable()
    try:
        with progress:
            yield advance
    finally:
        gc.enable()

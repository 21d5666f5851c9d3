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
from actsparse.commands.bench.results import Quantiles, Timing
from actsparse.commands.bench.tokens import make_sequences
from actsparse.runtime.progress import Say, shows_progress, status_console

# Tokens read before decoding is timed, and decoded tokens that are not counted: the first ones find nothing ready.
CONTEXT_TOKENS, DISCARDED_TOKENS = 64, 5
# Times of batches vary less than those of single tokens.
BATCH_TOKENS = 24

Key = TypeVar("Key")


def time_models(
    decoders: Mapping[tuple[str, str], Decoder],
    tokens: np.ndarray,
    *,
    num_tokens: int,
    batch_sizes: tuple[int, ...],
    prompt_lengths: tuple[int, ...],
    repetitions: int,
    say: Say,
) -> dict[str, dict[str, Timing]]:
    """
    Time decoding, decoding in batches, and reading prompts, each model in turn.

    :param tokens: [1, tokens]; prompts are its beginnings.
    """
    counts: dict[str, int] = {"num_prompt_tokens": CONTEXT_TOKENS, "num_discarded": DISCARDED_TOKENS}
    start = CONTEXT_TOKENS + DISCARDED_TOKENS
    say(f"decoding {num_tokens} tokens with each, turn by turn")
    batches = {1: time_decoding(decoders, tokens[:, : start + num_tokens], **counts)}
    for size in batch_sizes:
        if size > 1:
            say(f"decoding {size} sequences at once")
            sequences = make_sequences(tokens, size, start + min(BATCH_TOKENS, num_tokens))
            batches[size] = time_decoding(decoders, sequences, **counts)
    say(f"reading prompts of {', '.join(map(str, prompt_lengths))} tokens")
    first = time_first_token(decoders, tokens, prompt_lengths, repetitions)
    timings: dict[str, dict[str, Timing]] = {}
    for key in decoders:
        name, precision = key
        timings.setdefault(name, {})[precision] = Timing(
            Quantiles.of(batches[1][key]),
            {n: float(np.median(times[key])) for n, times in first.items()},
            {size: Quantiles.of(batches[size][key]) for size in batch_sizes},
        )
    return timings


def time_decoding(
    decoders: Mapping[Key, Decoder], tokens: np.ndarray, *, num_prompt_tokens: int, num_discarded: int
) -> dict[Key, list[float]]:
    """
    Decode the same tokens with each model, turn by turn.

    :param tokens: [sequences, tokens]; the sequences are decoded at once.
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

    :param tokens: [1, tokens]; the prompts are its beginnings.
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
    """Keep the garbage collector away, and show progress between measurements only: its thread would take a core."""
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

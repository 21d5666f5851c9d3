"""
Train a small Llama on the packaged Wikipedia and C4 text: a second real model where there is no hub to get one from.

    python benchmarks/train_small.py --out small [--steps 400] [--activation relu] [--checkpoints 8]

Five million parameters, a tokenizer of 4,096 pieces trained on the same text, some seven minutes on two cores. What
`load_model("default")`'s texts are evaluated on is not part of it. With checkpoints, the folder holds one folder for
each, the later the farther apart, as `actsparse inspect --checkpoints` reads them.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from command import announce, positive
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actsparse.console.report import write_json
from actsparse.runtime.progress import progress_bar
from actsparse.texts import load_pages, take_batches

VOCABULARY = 4096
LENGTH = 256
BATCH = 16
RATE = 2e-3
WARM_UP = 40


def train_tokenizer(pages: Sequence[str]) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer.

    :param pages: The text.
    :return: The tokenizer.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(pages, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=2048
    )


def train_model(
    windows: torch.Tensor, steps: int, activation: str, save: Callable[[LlamaForCausalLM, int], None]
) -> None:
    """
    Train a model.

    :param windows: Token windows, [windows, length].
    :param steps: Optimizer steps.
    :param activation: The activation function of the feed-forward networks.
    :param save: Called with the model after each step, and how many there have been.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        hidden_act=activation,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.randperm(len(windows))
    with progress_bar("training", total=steps, unit="steps") as advance:
        for step in range(steps):
            progress = max(0, step - WARM_UP) / max(1, steps - WARM_UP)
            rate = RATE * min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            picked = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=windows[picked], labels=windows[picked]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            advance(1)
            if step % 50 == 0 or step == steps - 1:
                announce(f"step {step}: loss {loss.item():.3f}")
            save(model, step + 1)


def space_checkpoints(steps: int, number: int) -> list[int]:
    """
    Choose when to save: at the end and, the earlier the closer together, from a sixteenth of the way on.

    :param steps: How many steps there are.
    :param number: How many checkpoints are wanted.
    :return: After which steps.
    """
    places = [steps * 16 ** (i / max(1, number - 1) - 1) for i in range(number)]
    return sorted({max(1, round(place)) for place in places[:-1]} | {steps})


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train and save.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=positive, default=400, help="optimizer steps")
    parser.add_argument("--activation", choices=("silu", "relu", "gelu"), default="silu", help="of the networks")
    parser.add_argument("--checkpoints", type=positive, help="how many models to save on the way, each in a folder")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    text = load_pages("default", purpose="training")
    tokenizer = train_tokenizer(text.pages)
    batches = take_batches(tokenizer, text, most=10**6, length=LENGTH)
    announce(f"{len(batches)} windows of {LENGTH} tokens of {text.name}")
    wanted = space_checkpoints(options.steps, options.checkpoints or 1)

    def save(model: LlamaForCausalLM, step: int) -> None:
        if step not in wanted:
            return
        folder = options.out / f"step-{step}" if options.checkpoints else options.out
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        state = {"global_step": step, "num_input_tokens_seen": step * BATCH * LENGTH}
        write_json(folder / "trainer_state.json", state)

    windows = torch.cat([batch["input_ids"] for batch in batches])
    train_model(windows, options.steps, options.activation, save)
    announce(f"{options.out} written in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

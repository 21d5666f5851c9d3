"""
Train a small Llama on the packaged Wikipedia and C4 text: a second real model where there is no hub to get one from.

    python benchmarks/train_small.py --out small [--steps 400]

Five million parameters, a tokenizer of 4,096 pieces trained on the same text, some seven minutes on two cores. What
`load_model("default")`'s texts are evaluated on is not part of it.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from command import announce, positive
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actsparse.progress import progress_bar
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


def train_model(windows: torch.Tensor, steps: int) -> LlamaForCausalLM:
    """
    Train a model.

    :param windows: Token windows, [windows, length].
    :param steps: Optimizer steps.
    :return: The model.
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
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Train and save.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=positive, default=400, help="optimizer steps")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    text = load_pages("default", purpose="training")
    tokenizer = train_tokenizer(text.pages)
    batches = take_batches(tokenizer, text, most=10**6, length=LENGTH)
    announce(f"{len(batches)} windows of {LENGTH} tokens of {text.name}")
    model = train_model(torch.cat([batch["input_ids"] for batch in batches]), options.steps)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    announce(f"{options.out} written in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

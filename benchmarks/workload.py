"""What the benchmarks run on: models, token batches and target sparsities."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bars import ROOT

from actsparse import TargetScope
from actsparse.models import load_model
from actsparse.storage.assets import fetch_text
from actsparse.texts import Text, load_pages, token_batches

Batch = dict[str, torch.Tensor]

# NNCF's published setting; `ffn.in` is what a feed-forward network without a gate has in place of up and gate.
FFN_TARGETS = {
    TargetScope(roles=("ffn.up", "ffn.gate", "ffn.in"), validate=False): 0.3,
    TargetScope(roles=("ffn.down",)): 0.5,
}


class Setting(NamedTuple):
    """Target sparsities, and what tables call them."""

    title: str
    targets: Any


SETTINGS = {
    "ffn": Setting("up/gate 30% + down 50%", FFN_TARGETS),
    "uniform-40": Setting("all 40%", 0.4),
    "uniform-50": Setting("all 50%", 0.5),
}


class Workload(NamedTuple):
    """A model, calibration batches for it, and what to record of both."""

    model: Any
    tokenizer: Any
    batches: list[Batch]
    settings: dict[str, Any]


def load_workload(options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Workload:
    """
    Load what the options that every benchmark has ask for.

    :param options: The options.
    :param dtype: Type of the model's weights.
    :return: The workload.
    """
    loaded = load_model(options.model, dtype=dtype)
    text = load_calibration_text(options.text)
    batches = token_batches(loaded.tokenizer, text, num_batches=options.batches, length=options.length)
    settings = {
        "model": options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "calibration": describe_text(text, options.batches, options.length),
    }
    return Workload(loaded.model, loaded.tokenizer, batches, settings)


def load_calibration_text(source: str) -> Text:
    """
    Load a text to calibrate with.

    :param source: `wiki`, the packaged Wikipedia articles but for the last quarter, which is held out for evaluation;
        or any source that `load_pages` knows.
    :return: The text.
    """
    if source != "wiki":
        return load_pages(source, purpose="calibration")
    # Text files are known by their suffix, and the package has another one for its own.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wiki.txt"
        path.write_bytes(fetch_text("wiki").read_bytes())
        articles = load_pages(path).pages
    first = articles[: len(articles) - len(articles) // 4]
    return Text(f"packaged Wikipedia text, first {len(first)} of {len(articles)} articles", first)


def load_wikitext() -> Text:
    """
    Load WikiText-2 raw's test split.

    :return: The text.
    """
    return load_pages(find_wikitext())


def find_wikitext() -> str:
    """
    Find WikiText-2 raw's test split in `$ACTSPARSE_DATA` (default: `../shared/data`), else on the hub.

    :return: The text source.
    """
    folder = Path(os.environ.get("ACTSPARSE_DATA", ROOT.parent / "shared" / "data"))
    path = folder / "wikitext-2-raw" / "wiki.test.raw"
    return str(path) if path.is_file() else "wikitext"


def describe_text(text: Text, num_batches: int, length: int) -> dict[str, Any]:
    """
    Say what batches were made of.

    :param text: The text.
    :param num_batches: Number of batches.
    :param length: Tokens in each.
    :return: What the JSON file records.
    """
    return {"text": text.name, "text_sha256": text.sha256, "batches": num_batches, "length": length}

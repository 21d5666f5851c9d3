"""
Time a masked forward pass in torch against the dense one, where zeros save nothing and only the masks' cost shows.

    python benchmarks/mask_cost.py --json mask_cost.json

Dense model, masked copies and NNCF's masked copies run in turn on one prompt.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from bars import Bar, Measurement
from command import announce, make_parser, positive, run_benchmark
from timing import time_interleaved
from torch import nn
from workload import SETTINGS, Batch, Workload, describe_text, load_workload

from actsparse import sparsify_activations
from actsparse.commands.regression.nncf_reference import sparsify_with_nncf, translate_targets
from actsparse.texts import load_pages, token_batches

COST_BAR = 1.15
DENSE = "dense"
SETTING_NAMES = ("ffn", "uniform-50")
WARM_UP = 2


def measure(options: argparse.Namespace) -> Measurement:
    """
    Time forward passes in both types.

    :param options: The options.
    :return: The ratios of the medians.
    """
    work = load_workload(options)
    text = load_pages("default")
    prompt = token_batches(work.tokenizer, text, num_batches=1, length=options.tokens)[0]
    announce("masking copies of the model")
    models = make_models(work)
    samples = {"fp32": time_models(models | make_nncf_models(work, options.no_nncf), prompt, options.repeats)}
    models = {name: model.to(torch.bfloat16) for name, model in models.items()}
    samples["bf16"] = time_models(models, prompt, options.repeats)
    bars = [bar for dtype, seconds in samples.items() for bar in make_bars(dtype, seconds)]
    settings = work.settings | {"dtype": list(samples), "prompt": describe_text(text, 1, options.tokens)}
    settings |= {"repeats": options.repeats, "tokens_masked": "all"}
    return Measurement(tuple(bars), settings, {"seconds": samples})


def make_models(work: Workload) -> dict[str, nn.Module]:
    """
    Make a masked copy of the model for each setting.

    :param work: The model and calibration batches.
    :return: The dense model and the copies, by name.
    """
    models: dict[str, nn.Module] = {DENSE: work.model}
    for name in SETTING_NAMES:
        models[SETTINGS[name].title] = sparsify_activations(
            copy.deepcopy(work.model), work.batches, SETTINGS[name].targets
        )
    return models


def make_nncf_models(work: Workload, is_left_out: bool) -> dict[str, nn.Module]:
    """
    Make a copy with NNCF's masks for each setting.

    :param work: The model and calibration batches.
    :param is_left_out: Whether to make none.
    :return: The copies, by name.
    """
    models: dict[str, nn.Module] = {}
    for name in () if is_left_out else SETTING_NAMES:
        targets = translate_targets(work.model, work.batches[0], SETTINGS[name].targets)
        models[f"NNCF {SETTINGS[name].title}"] = sparsify_with_nncf(copy.deepcopy(work.model), work.batches, targets)
    return models


def time_models(models: dict[str, nn.Module], prompt: Batch, repeats: int) -> dict[str, list[float]]:
    """
    Time a forward pass of each model.

    :param models: The models by name.
    :param prompt: The model input.
    :param repeats: How often to time each.
    :return: Seconds of every pass, by name.
    """
    announce(f"timing {', '.join(models)}: {repeats} repeats")
    contenders: dict[str, Any] = {name: partial(model, **prompt) for name, model in models.items()}
    with torch.no_grad():
        time_interleaved(contenders, repeats=WARM_UP)
        return time_interleaved(contenders, repeats=repeats)


def make_bars(dtype: str, samples: dict[str, list[float]]) -> list[Bar]:
    """
    Judge the medians.

    :param dtype: Type of the weights and activations.
    :param samples: Seconds of every pass, by model.
    :return: The figures; bars are for our masks.
    """
    medians = {name: median(seconds) for name, seconds in samples.items()}
    bars = []
    for name, seconds in medians.items():
        if name != DENSE:
            limit = None if name.startswith("NNCF") else COST_BAR
            note = f"{seconds * 1e3:.0f} ms over {medians[DENSE] * 1e3:.0f} ms"
            bars.append(Bar(f"{name}, {dtype}: time over dense", seconds / medians[DENSE], limit, note=note))
    return bars


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_parser("Time a masked forward pass in torch against the dense one.", num_batches=4)
    parser.add_argument("--tokens", type=positive, default=512, help="tokens in the prompt that is timed")
    parser.add_argument("--repeats", type=positive, default=15, help="how often to time each model")
    parser.add_argument("--no-nncf", action="store_true", help="leave NNCF's masks out")
    return run_benchmark("mask_cost", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

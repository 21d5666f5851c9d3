"""
Hold the bound behind corrected GxO against what really happens when heads and neurons are switched off one at a time.

    python benchmarks/attribution_bound.py --questions TruthfulQA.csv [--number 16] [--tokens 8] [--json bound.json]

What a token's loss grows by without a unit, less -g·o, is the error of GxO; the paper (arXiv 2406.06562) bounds it by
‖o‖ ‖g‖. Beside it, how well each metric ranks the units by what their absence does.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from bars import Bar, Measurement
from command import make_plain_parser, positive, run_benchmark

from actsparse.commands.studies.attribution.bound import drop_units
from actsparse.commands.studies.attribution.prompts import encode_questions
from actsparse.commands.studies.units import find_units
from actsparse.models import load_model
from actsparse.texts.questions import load_questions

MIN_WITHIN = 0.99


def measure(options: argparse.Namespace) -> Measurement:
    """
    Switch units off.

    :param options: The options.
    :return: How often the bound holds, and the metrics' rank correlations.
    """
    questions = load_questions(options.questions, number=options.number)
    loaded = load_model(options.model)
    model = loaded.model.to(options.device)
    prompts = encode_questions(loaded.tokenizer, questions)
    layers = find_units(model, {"input_ids": torch.ones(1, 4, dtype=torch.long, device=options.device)})
    found = drop_units(model, layers, prompts, tokens=options.tokens, sample=options.sample)
    bars = []
    for kind, drops in found.items():
        summary = drops.to_dict()
        note = f"{summary['drops']} drops; {100 * summary['between_0_and_bound']:.0f}% between 0 and the bound"
        bars.append(Bar(f"{kind}: share within the bound", summary["within_bound"], MIN_WITHIN, True, note=note))
        used = summary["missed_over_bound_quantiles_1_25_50_75_99"][-1]
        bars.append(Bar(f"{kind}: error beside the bound, 99% below", used))
        bars += [Bar(f"{kind}: rank correlation of {name}", value) for name, value in drops.ranks.items()]
    settings = {"model": options.model, "questions": options.number, "tokens": options.tokens, "device": options.device}
    return Measurement(tuple(bars), settings, {kind: drops.to_dict() for kind, drops in found.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = make_plain_parser("Hold GxO's error bound against the loss without single heads and neurons.")
    parser.add_argument("--model", default="default", help="hub id, folder, GGUF file or default")
    parser.add_argument("--questions", required=True, help="a .csv or .jsonl file with a field question")
    parser.add_argument("--number", type=positive, default=16, help="how many questions")
    parser.add_argument("--tokens", type=positive, default=8, help="how many tokens to generate for each")
    parser.add_argument("--sample", type=positive, default=32, help="units of each layer to try, at each token")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return run_benchmark("attribution_bound", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

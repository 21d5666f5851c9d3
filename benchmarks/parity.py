"""
Hold `algorithm="nncf"` against NNCF itself: the same thresholds and the same logits.

    python benchmarks/parity.py --json parity.json

On a real model by name patterns and by roles, on tiny random models of eight architectures, and with a script in which
nothing but the import changes.
"""

import argparse
import copy
import math
import runpy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bars import Bar, Measurement
from command import announce, make_parser, positive, run_benchmark
from tiny_models import FAMILIES, GATED, Patterns, make_tiny
from torch import nn
from workload import FFN_TARGETS, Batch, load_workload

from actsparse import TargetScope, sparsify_activations
from actsparse.commands.regression.nncf_reference import (
    NncfTargetScope,
    find_layer_names,
    named_nncf_sparsifiers,
    sparsify_with_nncf,
    translate_targets,
)
from actsparse.texts import load_pages, token_batches
from actsparse.torch.compression import quiet_nncf
from actsparse.torch.insertion import named_sparsifiers

THRESHOLD_BAR = 1e-6
LOGITS_BAR = 1e-5

# What NNCF's documentation shows, with the import left open.
SCRIPT = """
import nncf
from {module} import TargetScope, sparsify_activations

model = sparsify_activations(
    model=model,
    dataset=nncf.Dataset(batches, lambda batch: batch),
    target_sparsity_by_scope={{
        TargetScope(patterns=[".*up_proj.*", ".*gate_proj.*"]): 0.3,
        TargetScope(patterns=[".*down_proj.*"]): 0.5,
    }},
    ignored_scope=nncf.IgnoredScope(patterns=["lm_head.*"]),
)
"""
MODULES = ("nncf.experimental.torch.sparsify_activations", "actsparse")


@dataclass(frozen=True)
class Difference:
    """
    How far two masked models are apart.

    :param layers: Number of layers that both mask.
    :param threshold: Largest relative difference of a threshold; infinite where they mask different layers.
    :param logits: Largest absolute difference of an output.
    :param scale: Largest magnitude among NNCF's outputs.
    """

    layers: int
    threshold: float
    logits: float
    scale: float


def measure(options: argparse.Namespace) -> Measurement:
    """
    Compare on all models.

    :param options: The options.
    :return: The largest differences.
    """
    work = load_workload(options)
    held_out = token_batches(work.tokenizer, load_pages("default"), num_batches=options.held_out, length=options.length)
    announce("real model: NNCF and both of our ways to name the same layers")
    real = compare(work.model, work.batches, held_out, GATED)
    tiny: dict[str, dict[str, Difference]] = {}
    for family, patterns in FAMILIES.items():
        announce(f"tiny {family}")
        tiny[family] = compare(*make_tiny(family), patterns) | compare_uniform(*make_tiny(family))
    announce("a script in which only the import changes")
    only_one, changed = compare_script(work.model, work.batches[:2])
    all_tiny = [difference for found in tiny.values() for difference in found.values()]
    bars = [bar for way, difference in real.items() for bar in make_bars(f"real model {way}", [difference])]
    bars += make_bars(f"tiny models, {len(tiny)} architectures", all_tiny)
    bars.append(Bar("script with only the import changed: layers that one side masks", float(only_one), 0))
    samples = {"real": real, "script_layers": changed} | {f"tiny {family}": found for family, found in tiny.items()}
    settings = work.settings | {"held_out_tokens": options.held_out * options.length, "tokens_masked": "all"}
    return Measurement(tuple(bars), settings, to_json(samples))


def make_bars(name: str, found: list[Difference]) -> list[Bar]:
    """
    Judge the largest of some differences.

    :param name: What was compared.
    :param found: The differences.
    :return: The figures.
    """
    threshold, logits = max(d.threshold for d in found), max(d.logits for d in found)
    layers = sum(d.layers for d in found)
    relative = max(d.logits / d.scale for d in found)
    return [
        Bar(f"{name}: thresholds", threshold, THRESHOLD_BAR, note=f"largest relative difference, {layers} layers"),
        Bar(f"{name}: logits", logits, LOGITS_BAR, note=f"largest difference; {relative:.1g} of the largest logit"),
    ]


def compare(model: nn.Module, batches: list[Batch], held_out: list[Batch], patterns: Patterns) -> dict[str, Difference]:
    """
    Compare with NNCF aiming by patterns, us by the same patterns and by roles.

    :param model: A model without masks; left as it is.
    :param batches: Calibration batches.
    :param held_out: Batches to compare outputs on.
    :param patterns: Patterns of the layers that get 30% and of those that get 50%.
    :return: The difference for each way to name the layers.
    """
    by_patterns = {way: dict(zip(make_scopes(way, patterns), (0.3, 0.5), strict=True)) for way in ("nncf", "ours")}
    ways = {"by patterns": by_patterns["ours"], "by roles": FFN_TARGETS}
    return compare_with(model, batches, held_out, by_patterns["nncf"], ways)


def make_scopes(side: str, patterns: Patterns) -> list[Any]:
    """
    Make the scopes of one side.

    :param side: `nncf` or `ours`.
    :param patterns: Patterns of each scope.
    :return: The scopes.
    """
    scope = NncfTargetScope if side == "nncf" else TargetScope
    return [scope(patterns=list(p)) for p in patterns]


def compare_uniform(model: nn.Module, batches: list[Batch], held_out: list[Batch]) -> dict[str, Difference]:
    """
    Compare at 40% on every Linear layer of the blocks, attention included.

    :param model: A model without masks.
    :param batches: Calibration batches.
    :param held_out: Batches to compare outputs on.
    :return: The difference.
    """
    return compare_with(model, batches, held_out, translate_targets(model, batches[0], 0.4), {"uniform 40%": 0.4})


def compare_with(
    model: nn.Module, batches: list[Batch], held_out: list[Batch], nncf_targets: dict[Any, float], ways: dict[str, Any]
) -> dict[str, Difference]:
    """
    Calibrate with NNCF once and with us in each way, and compare.

    :param model: A model without masks; left as it is.
    :param batches: Calibration batches.
    :param held_out: Batches to compare outputs on.
    :param nncf_targets: Target sparsities for NNCF.
    :param ways: Target sparsities for us, by what to call them.
    :return: The difference for each way.
    """
    layer_names = find_layer_names(model, batches[0])
    reference = sparsify_with_nncf(copy.deepcopy(model), batches, nncf_targets)
    thresholds = {layer_names[n]: s.running_threshold.item() for n, s in named_nncf_sparsifiers(reference).items()}
    expected = run_outputs(reference, held_out)
    found = {}
    for way, targets in ways.items():
        ours = sparsify_activations(copy.deepcopy(model), batches, targets, algorithm="nncf")
        our_thresholds = {name: s.threshold.item() for name, s in named_sparsifiers(ours)}
        found[way] = Difference(
            len(our_thresholds),
            largest_relative_difference(our_thresholds, thresholds),
            max((a - b).abs().max().item() for a, b in zip(run_outputs(ours, held_out), expected, strict=True)),
            max(x.abs().max().item() for x in expected),
        )
    return found


def largest_relative_difference(ours: dict[str, float], nncf: dict[str, float]) -> float:
    """
    Compare thresholds.

    :param ours: Our thresholds by layer.
    :param nncf: NNCF's thresholds by layer.
    :return: The largest difference, relative to NNCF's; infinity if the layers differ.
    """
    if ours.keys() != nncf.keys():
        return math.inf
    pairs = ((ours[name], nncf[name]) for name in nncf)
    return max(0.0 if a == b else abs(a - b) / max(abs(b), sys.float_info.min) for a, b in pairs)


def run_outputs(model: nn.Module, batches: list[Batch]) -> list[torch.Tensor]:
    """
    Run a model.

    :param model: The model.
    :param batches: Model inputs.
    :return: Its first output for each: logits, or an encoder's last hidden state.
    """
    with torch.no_grad():
        return [model(**batch)[0].float() for batch in batches]


def compare_script(model: nn.Module, batches: list[Batch]) -> tuple[int, dict[str, int]]:
    """
    Run one and the same script with NNCF's import and with ours.

    :param model: A model without masks; left as it is.
    :param batches: Calibration batches.
    :return: Number of layers and targets that only one of the two has, and the number that each has.
    """
    layer_names = find_layer_names(model, batches[0])
    masked: dict[str, set[tuple[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for module in MODULES:
            script = Path(folder) / "script.py"
            script.write_text(SCRIPT.format(module=module), encoding="utf-8")
            with quiet_nncf():
                names = runpy.run_path(str(script), {"model": copy.deepcopy(model), "batches": batches})
            if module == "actsparse":
                masked[module] = {(n, s.target_sparsity) for n, s in named_sparsifiers(names["model"])}
            else:
                sparsifiers = named_nncf_sparsifiers(names["model"])
                masked[module] = {(layer_names[n], s.target_sparsity) for n, s in sparsifiers.items()}
    nncf, ours = (masked[module] for module in MODULES)
    return len(nncf ^ ours), {module: len(found) for module, found in masked.items()}


def to_json(value: Any) -> Any:
    """
    Turn differences into what JSON can hold.

    :param value: A difference, or a dict of them.
    :return: The same as plain dicts.
    """
    if isinstance(value, Difference):
        return vars(value)
    return {name: to_json(item) for name, item in value.items()} if isinstance(value, dict) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_parser("Hold algorithm='nncf' against NNCF's own thresholds and logits.")
    parser.add_argument("--held-out", type=positive, default=4, help="held-out batches to compare logits on")
    return run_benchmark("parity", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

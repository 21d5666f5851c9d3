"""The front page's table: how fast each model decodes beside what its masks cost."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bars import join_rows
from peers import DENSE, PAIRS, PROMPT, sum_up
from real_models import REAL_MODELS

_COLUMNS = (
    "model",
    "weights",
    "sparsity (while timed)",
    "decoding over dense OpenVINO",
    "over llama.cpp",
    f"prompt of {PROMPT}, time over dense",
    "loss of `magnitude`",
    "loss of `auto`",
)
_BUDGETS = (0.01, 0.03, 0.1, 0.3)
_CHOICES = ("model", "budget", "dense OpenVINO", "llama.cpp", "actsparse", "over the faster of both")
_POINTS = ("form", "sparsity", "nats a token", "tokens/s", "first token of 128, ms", "MB on disk", "peak MB")
Results = Mapping[str, Mapping[str, Any]]


class Line(NamedTuple):
    """
    A line of the table; None where nothing was measured.

    :param model: The model.
    :param weights: Their type.
    :param target: What was asked for.
    :param measured: The sparsity while decoding was timed.
    :param over_dense: How many times as fast as dense OpenVINO it decodes.
    :param over_llama: How many times as fast as llama.cpp with weights of about the same size.
    :param prompt: The time to its first token over that of dense OpenVINO.
    :param losses: Nats a token that `magnitude` and `auto` lose.
    """

    model: str
    weights: str
    target: str
    measured: float | None
    over_dense: float | None
    over_llama: float | None
    prompt: float | None
    losses: tuple[float | None, float | None]

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table shows."""
        sparsity = self.target if self.measured is None else f"{self.target} ({self.measured:.1%})"
        speeds = ("–" if ratio is None else f"{ratio:.2f}×" for ratio in (self.over_dense, self.over_llama))
        prompt = "–" if self.prompt is None else f"{self.prompt:.2f}"
        losses = ("–" if x is None else f"{x:.3f} ({math.expm1(x):+.0%})" for x in self.losses)
        return (self.model, self.weights, sparsity, *speeds, prompt, *losses)


def read_results(folder: Path) -> Results:
    """
    Read what the table is made of, as far as it is there.

    :param folder: The benchmarks' results.
    :return: The JSON files' contents by name.
    """
    paths = {name: folder / f"{name}.json" for name in ("peers", "decode_speed", "frontier", "demo", "pareto")}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def make_lines(results: Results) -> list[Line]:
    """
    Put speed beside loss.

    :param results: Of `read_results`.
    :return: The table's lines.
    """
    lines = [*_list_peers(results, "default", "all"), *_list_demo(results)]
    lines += _list_peers(results, "qwen", f"{REAL_MODELS['qwen'].title}: all")
    for case, weights, targets in (
        ("1b, all 5–70%", "INT8", (0.3, 0.4)),
        ("1b, all 50%", "INT8", (0.5,)),
        ("1b INT4, all 50%", "INT4", (0.5,)),
    ):
        for point in results.get("decode_speed", {}).get("samples", {}).get(case, ()):
            if point["target"] in targets:
                prompt = point["ttft_ratio"].get(str(PROMPT))
                speed = (point["measured_sparsity"], point["decode_speedup"], None, prompt)
                lines.append(Line("1.1B Llama, random", weights, f"{point['target']:.0%}", *speed, (None, None)))
    return lines


def make_summary(results: Results) -> str:
    """
    Write the table, and in a few lines what does not fit into it.

    :param results: Of `read_results`.
    :return: Markdown; empty where nothing was measured.
    """
    lines = make_lines(results)
    if not lines:
        return ""
    alignment = ("---", "---", *("---:",) * (len(_COLUMNS) - 2))
    table = join_rows([_COLUMNS, alignment, *(line.cells for line in lines)])
    return "\n\n".join([table, *_describe_batches(results), *_describe_machine(results)])


def make_choices(results: Results) -> str:
    """
    Write the table that users choose by: what is fastest within each budget of perplexity, on each model.

    :param results: Of `read_results`.
    :return: Markdown; empty where nothing was measured.
    """
    rows = []
    for name, points in results.get("pareto", {}).get("samples", {}).items():
        for budget in _BUDGETS:
            within = [point for point in points if math.expm1(point["loss_increase"]) <= budget]
            dense, llama, ours = (
                min((x for x in within if kind_of_point(x) == kind), key=lambda x: x["decode_ms"], default=None)
                for kind in ("OpenVINO", "llama.cpp", "actsparse")
            )
            others = [x["decode_ms"] for x in (dense, llama) if x]
            over = f"{min(others) / ours['decode_ms']:.2f}×" if ours and others else "–"
            rows.append((REAL_MODELS[name].title, f"{budget:.0%}", *map(_describe_point, (dense, llama, ours)), over))
    if not rows:
        return ""
    return join_rows([_CHOICES, ("---", "---:", "---", "---", "---", "---:"), *rows])


def make_points(results: Results) -> str:
    """
    Write all that was measured of bits and sparsity side by side.

    :param results: Of `read_results`.
    :return: Markdown, a table for each model; empty where nothing was measured.
    """
    tables = []
    for name, points in results.get("pareto", {}).get("samples", {}).items():
        rows = []
        for x in points:
            low, high = x["loss_increase_interval"]
            peak = f"{x['peak'] / 1e6:.0f}" if x["peak"] else "–"
            loss = f"{x['loss_increase']:.4f} ({low:.4f} to {high:.4f})"
            speed = (f"{1e3 / x['decode_ms']:.0f}", f"{x['first_token_ms']:.0f}")
            rows.append((x["name"], f"{x['measured_sparsity']:.1%}", loss, *speed, f"{x['disk'] / 1e6:.0f}", peak))
        tables.append(f"{REAL_MODELS[name].title}:\n\n{join_rows([_POINTS, ('---', *('---:',) * 6), *rows])}")
    return "\n\n".join(tables)


def kind_of_point(point: Mapping[str, Any]) -> str:
    """
    Tell what runs a point.

    :param point: One of `pareto.py`'s.
    :return: ``OpenVINO``, ``llama.cpp`` or ``actsparse``.
    """
    return str(point["group"]).split()[0] if point["is_dense"] else "actsparse"


def _describe_point(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return "nothing"
    name = point["name"].removeprefix("llama.cpp ")
    return f"{name}: {1e3 / point['decode_ms']:.0f} tokens/s, {math.expm1(point['loss_increase']):+.1%}"


def _list_peers(results: Results, key: str, setting: str) -> list[Line]:
    lines = []
    for weights in PAIRS:
        case = results.get("peers", {}).get("samples", {}).get(f"{key}-{weights}")
        if case is None:
            continue
        best = sum_up(case["rounds"])
        for name, measured in case["sparsities"].items():
            target = name.removeprefix("accelerated ")
            # Losses are those of the weights before compression, which INT8 hardly changes.
            has_losses = weights == "int8"
            if not has_losses and target != "50%":
                continue
            over = {other: best[other]["decode"][0] / best[name]["decode"][0] for other in (DENSE, "llama.cpp")}
            prompt = best[name]["prompt"][0] / best[DENSE]["prompt"][0]
            losses = _find_losses(results, setting, int(target.rstrip("%")) / 100) if has_losses else (None, None)
            title = REAL_MODELS[key].title
            lines.append(Line(title, weights.upper(), target, measured, over[DENSE], over["llama.cpp"], prompt, losses))
    return lines


def _find_losses(results: Results, setting: str, target: float) -> tuple[float | None, float | None]:
    points = results.get("frontier", {}).get("samples", {}).get(setting, ())

    def mean(algorithm: str) -> float | None:
        found = [x["loss_increase"] for x in points if (x["algorithm"], x["sparsity"]) == (algorithm, target)]
        return fmean(found) if found else None

    return mean("magnitude"), mean("auto")


def _list_demo(results: Results) -> list[Line]:
    """Take the demo's mix: its losses are those of INT8 weights on its own text."""
    if "demo" not in results:
        return []
    dense = results["demo"]["rows"][0]
    row = next(row for row in results["demo"]["rows"] if row["name"].startswith("INT8"))
    mix = row["name"].partition("sparse, ")[2]
    loss = (row["negative_log_likelihood"] - dense["negative_log_likelihood"]) / dense["num_tokens"]
    timed = results["demo"].get("decoding", {}).get("rows", ())
    speed = next((x["speedup"] for x in timed if x["name"].startswith(mix)), None)
    return [
        Line(
            "… `make demo`",
            "INT8",
            f"{mix} = {row['sparsity']['sparsity']:.1%}",
            None,
            speed,
            *(None, None),
            (loss, None),
        )
    ]


def _describe_batches(results: Results) -> list[str]:
    """Tell of the 1.1B model at 50% what the table has no column for."""
    bars = {bar["name"]: bar["measured"] for bar in results.get("decode_speed", {}).get("bars", ())}
    prefix = "1b, all 50%: "
    batches = {
        name.removeprefix(prefix).removesuffix(" sequences, speed-up"): ratio
        for name, ratio in bars.items()
        if name.startswith(prefix) and name.endswith("sequences, speed-up")
    }
    prompts = [ratio for name, ratio in bars.items() if name.startswith(f"{prefix}first token")]
    if not batches or not prompts:
        return []
    several = ", ".join(f"{ratio:.2f} with {size}" for size, ratio in batches.items())
    return [
        f"Several sequences at once (1.1B, 50%), times as fast as dense: {several}. Its first tokens take "
        f"{min(prompts):.2f} to {max(prompts):.2f} of dense's time, the process "
        f"{bars[f'{prefix}peak memory over dense']:.2f} of its memory."
    ]


def _describe_machine(results: Results) -> list[str]:
    if "peers" not in results:
        return []
    machine, builds = results["peers"]["machine"], results["peers"]["settings"]["llama.cpp"]
    left_out: Sequence[str] = builds["left out"]
    has_amx = "AMX" in {*builds["on"], *left_out}  # the builds that the processor has instructions for
    processor = machine["processor"] + (" with AMX" if has_amx else "")
    without = f", without its {' and '.join(left_out)} build, which does not run there" if left_out else ""
    weights, threads = " and ".join(PAIRS.values()), f"{machine['threads']} threads of {machine['cores']} cores"
    return [f"Decoding: {processor}, {threads}; llama.cpp with {weights} weights{without}."]

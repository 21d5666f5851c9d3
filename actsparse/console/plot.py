"""Plots; they need the `plot` extra."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actsparse.errors import OutputError
from actsparse.sparsity_report import LayerSparsity, SparsityReport
from actsparse.storage.files import write_bytes

# The panels of a history, by what their axes say, and the figures that each shows.
_HISTORY = {
    "word perplexity": ("word_perplexity", "dense_word_perplexity", "nncf_word_perplexity"),
    "token perplexity": ("token_perplexity", "dense_token_perplexity"),
    "nats a token": ("loss_increase", "nncf_loss_increase", "loss_over_nncf"),
    "share": ("sparsity", "farthest_layer", "weight_reads_skipped", "nncf_sparsity"),
    "calibration over forward passes": ("calibration_ratio", "nncf_calibration_ratio"),
    "MB": ("peak_memory_mb",),
    "times as fast as dense": ("decode_ratio",),
}


def plot_sparsity_by_layer(reports: Mapping[str, SparsityReport], path: Path) -> None:
    """
    Draw measured sparsity against depth, a line for each kind of site, beside what was allocated and asked for.

    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    figure = make_figure(path, (5.5 * len(reports), 4))
    panels = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for panel, (title, report) in zip(panels, reports.items(), strict=True):
        for number, (kind, points) in enumerate(_group_by_kind(report).items()):
            measured, *asked = ([100 * share for share in line] for line in zip(*points, strict=True))
            panel.plot(measured, label=kind, color=f"C{number}", linewidth=1.5)
            for line, style in zip(asked, ("--", ":"), strict=True):
                panel.plot(line, color=f"C{number}", linewidth=0.8, linestyle=style)
        panel.set(title=title, xlabel="depth (sites of one kind, in order)", ylim=(0, 100))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    panels[0].set_ylabel("measured sparsity, % (dashed: allocated, dotted: target)")
    save_figure(figure, path)


def _group_by_kind(report: SparsityReport) -> dict[str, list[tuple[float, ...]]]:
    sites: dict[str, list[LayerSparsity]] = {}
    for layer in report.layers:
        sites.setdefault(layer.site, []).append(layer)
    kinds: dict[str, list[tuple[float, ...]]] = {}
    for layers in sites.values():
        # Layers of a site see one tensor: unless their targets differ, the first speaks for all.
        roles = dict.fromkeys(role for layer in layers for role in layer.roles)
        shares = (layers[0].sparsity, layers[0].allocated_sparsity, layers[0].target_sparsity)
        point = tuple(math.nan if share is None else share for share in shares)
        kinds.setdefault(" + ".join(roles) or "other", []).append(point)
    return kinds


def plot_speedup(points: Sequence[tuple[float, float]], accelerated_share: float, title: str, path: Path) -> None:
    """
    Draw decode speed-up against measured sparsity, below the most that fewer weight bytes could give.

    :param accelerated_share: Share of all weight bytes in layers that can skip reads.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    figure = make_figure(path, (6, 4))
    panel = figure.subplots()
    ends = [s / 100 for s in range(96)]
    limits = [1 / (1 - accelerated_share * s) for s in ends]
    panel.plot([100 * s for s in ends], limits, color="0.5", linestyle="--", label="byte limit")
    measured = sorted(points)
    panel.plot([100 * s for s, _ in measured], [x for _, x in measured], marker="o", label="measured")
    panel.axhline(1, color="0.8", linewidth=0.8)
    top = 1.1 * max(x for _, x in measured)
    panel.set(
        title=title, xlabel="measured sparsity, %", ylabel="decode speed-up", xlim=(0, 100), ylim=(0, max(top, 2))
    )
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    save_figure(figure, path)


def plot_frontier(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """
    Draw the loss that sparsity costs, a line for each algorithm.

    :param points: `algorithm`, `measured_sparsity`, `loss_increase` and its interval.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    figure = make_figure(path, (7, 5))
    panel = figure.subplots()
    for name in dict.fromkeys(point["algorithm"] for point in points):
        line = sorted((p for p in points if p["algorithm"] == name), key=lambda p: p["measured_sparsity"])
        x = [100 * p["measured_sparsity"] for p in line]
        y = [p["loss_increase"] for p in line]
        ends = [p["loss_increase_interval"] for p in line]
        errors = [[max(v - low, 0) for v, (low, _) in zip(y, ends, strict=True)],
                  [max(high - v, 0) for v, (_, high) in zip(y, ends, strict=True)]]  # fmt: skip
        panel.errorbar(x, y, yerr=errors, marker="o", capsize=2, linewidth=1.2, label=name)
    panel.set(xlabel="measured sparsity, % of weight bytes", ylabel="log(perplexity / dense perplexity), per token")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    save_figure(figure, path)


def plot_tradeoff(points: Sequence[Mapping[str, Any]], limit: float | None, path: Path) -> None:
    """
    Draw speed against what it costs, and the line of those that nothing beats in both.

    :param points: `group`, `name`, `perplexity_increase`, `tokens_per_second`, and `is_chosen`.
    :param limit: The most that perplexity may rise; None where there is none.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    figure = make_figure(path, (8, 5))
    panel = figure.subplots()
    for number, group in enumerate(dict.fromkeys(point["group"] for point in points)):
        own = [point for point in points if point["group"] == group]
        panel.scatter(*_places(own), color=f"C{number}", label=group, s=28, zorder=3)
    best: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda point: (point["perplexity_increase"], -point["tokens_per_second"])):
        if not best or point["tokens_per_second"] > best[-1]["tokens_per_second"]:
            best.append(point)
    panel.step(*_places(best), where="post", color="0.6", linewidth=1, zorder=1)
    for point in points:
        if point in best or point["is_chosen"]:
            place = (100 * point["perplexity_increase"], point["tokens_per_second"])
            weight = "bold" if point["is_chosen"] else "normal"
            panel.annotate(point["name"], place, xytext=(5, 4), textcoords="offset points", fontsize=7, weight=weight)
    if limit is not None:
        panel.axvline(100 * limit, color="C3", linewidth=0.8, linestyle="--", label="limit")
    panel.set(xlabel="token perplexity over the model's own weights, %", ylabel="decoded tokens a second")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    save_figure(figure, path)


def _places(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [100 * p["perplexity_increase"] for p in points], [p["tokens_per_second"] for p in points]


def plot_history(points: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """
    Draw a regression case's figures over commits, with their intervals.

    :param points: In the order of commits: `commit`, and `figures`, by name a value and its interval's ends or None.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    panels: dict[str, dict[str, list[Any]]] = {
        label: {name: [point["figures"].get(name) for point in points] for name in names if name in _seen(points)}
        for label, names in _HISTORY.items()
    }
    panels = {label: lines for label, lines in panels.items() if lines}
    figure = make_figure(path, (max(6.0, 0.35 * len(points) + 3), 2.4 * len(panels) + 0.8))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            places = [i for i, value in enumerate(values) if value is not None]
            known = [value for value in values if value is not None]
            errors = [[max(value - (value if end is None else end), 0) for value, end, _ in known],
                      [max((value if end is None else end) - value, 0) for value, _, end in known]]  # fmt: skip
            axis.errorbar(places, [v for v, _, _ in known], yerr=errors, marker="o", markersize=4, capsize=2,
                          linewidth=1.2, label=name.replace("_", " "))  # fmt: skip
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_title(title)
    axes[-1].set_xticks(range(len(points)), [point["commit"] for point in points], rotation=90, fontsize=7)
    axes[-1].set_xlabel("commit (*: with changes)")
    save_figure(figure, path)


def _seen(points: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for point in points for name in point["figures"]}


def make_figure(path: Path, size: tuple[float, float]) -> Any:
    """
    Make an empty figure.

    :raises OutputError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        msg = f"cannot draw {path}: matplotlib is not installed; pip install 'actsparse[plot]'"
        raise OutputError(msg) from None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """
    Write a figure, whole or not at all.

    :param figure: The figure, of `make_figure`.
    :raises OutputError: If it cannot be written.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # A dollar sign in a model's name or a token begins no formula.
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=120)
    write_bytes(path, buffer.getvalue())

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

    :param reports: Measured sparsity by title; one panel each.
    :param path: The PNG file to write.
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

    :param points: Measured sparsity and speed-up.
    :param accelerated_share: Share of all weight bytes in layers that can skip reads.
    :param title: What was measured.
    :param path: The PNG file to write.
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
    :param path: The PNG file to write.
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


def plot_attribution(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """
    Draw how like the dense model's texts stay, a panel for each mode and kind of units and a line for each metric.

    :param points: `mode`, `metric`, `where`, `ratio`, `bleu`.
    :param path: The PNG or PDF file to write.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    titles = list(dict.fromkeys((p["mode"], p["where"]) for p in points))
    metrics = list(dict.fromkeys(p["metric"] for p in points))
    figure = make_figure(path, (5.5 * len(titles), 4))
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        for number, metric in enumerate(metrics):
            line = [p for p in points if (p["mode"], p["where"]) == title and p["metric"] == metric]
            x, y = [100 * p["ratio"] for p in line], [p["bleu"] for p in line]
            panel.plot(x, y, marker="o", markersize=4, linewidth=1.2, color=f"C{number}", label=metric)
        panel.set(title=", ".join(title), xlabel="units switched off, %", xlim=(-2, 102), ylim=(0, 103))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("BLEU against the dense model")
    panels[0].legend(fontsize="small")
    save_figure(figure, path)


def plot_heat_map(rows: Sequence[Sequence[float]], tokens: Sequence[str], title: str, path: Path) -> None:
    """
    Draw the share of active entries of every layer at every token.

    :param rows: A share for each token, by layer.
    :param tokens: The tokens' texts.
    :param title: What is shown.
    :param path: The PNG file to write.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    figure = make_figure(path, (max(6.0, 0.16 * len(tokens) + 2), max(3.0, 0.14 * len(rows) + 2)))
    panel = figure.subplots()
    image = panel.imshow([[100 * share for share in row] for row in rows], aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=panel, label="active entries, %")
    labels = [token.replace("\n", "↵").strip() or "·" for token in tokens]
    panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    panel.set(title=title, xlabel="token", ylabel="layer")
    save_figure(figure, path)


def plot_series(
    series: Mapping[str, Sequence[tuple[float, float]]], laws: Mapping[str, Any], unit: str, title: str, path: Path
) -> None:
    """
    Draw the share of active entries against how far checkpoints have been trained, with the law fitted to each series.

    :param series: By name, how far and the share.
    :param laws: By name the law, where there is one.
    :param unit: What says how far.
    :param title: What is shown.
    :param path: The PNG file to write.
    :raises OutputError: If matplotlib is missing or the file cannot be written.
    """
    figure = make_figure(path, (7, 4.5))
    panel = figure.subplots()
    for number, (name, points) in enumerate(series.items()):
        x = [seen for seen, _ in points]
        panel.plot(x, [100 * share for _, share in points], "o", markersize=5, color=f"C{number}", label=name)
        if name in laws:
            law, ends = laws[name], [min(x) + (max(x) - min(x)) * i / 200 for i in range(201)]
            label = f"{law.form}, R² {law.r_squared:.2f}"
            panel.plot(ends, [100 * share for share in law.predict(ends)], color=f"C{number}", label=label)
    panel.set(title=title, xlabel=unit, ylabel="active entries, mean over layers, %")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    save_figure(figure, path)


def plot_history(points: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """
    Draw a regression case's figures over commits, with their intervals.

    :param points: In the order of commits: `commit`, and `figures`, by name a value and its interval's ends or None.
    :param title: What is shown.
    :param path: The PNG file to write.
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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        msg = f"cannot draw {path}: matplotlib is not installed; pip install 'actsparse[plot]'"
        raise OutputError(msg) from None
    return Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        # A dollar sign in a model's name or a token begins no formula.
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=120)
    write_bytes(path, buffer.getvalue())

"""Activation over the checkpoints of a training."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from actsparse.commands.studies.inspection.law import Law, fit_law
from actsparse.console.plot import make_figure, save_figure
from actsparse.console.report import make_caption, percent, read_json

TOKENS, STEPS, ORDER = "tokens", "steps", "order"


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint and what was found of it.

    :param unit: What `seen` counts: `TOKENS`, `STEPS`, or only its `ORDER`.
    :param figures: What `Inspection.to_dict` said.
    """

    series: str
    folder: str
    seen: float
    unit: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Series:
    """The checkpoints of one or more trainings."""

    checkpoints: tuple[Checkpoint, ...]
    settings: dict[str, Any]

    @property
    def by_name(self) -> dict[str, list[Checkpoint]]:
        """The checkpoints of each training."""
        found: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            found.setdefault(checkpoint.series, []).append(checkpoint)
        return found

    @cached_property
    def laws(self) -> dict[str, Law]:
        """The sparsing law fitted to each training that counts what it has seen and has checkpoints enough."""
        found = {}
        for name, checkpoints in self.by_name.items():
            counted = [c for c in checkpoints if c.unit != ORDER and c.seen > 0]
            law = fit_law([c.seen for c in counted], [c.figures["mean_activation"] for c in counted])
            if law is not None:
                found[name] = law
        return found

    def to_table(self) -> Table:
        """Draw the series for a terminal."""
        caption = make_caption(self.settings)
        for name in self.by_name:
            law = self.laws.get(name)
            if law is not None:
                parameters = ", ".join(f"{key} = {value:.4g}" for key, value in law.parameters.items())
                caption += f"\n{name}: {law.form} with {parameters}; D in millions; R² {law.r_squared:.3f}"
            else:
                caption += f"\n{name}: no law fitted (it takes four checkpoints or more that say how far they are)"
        table = Table(title="Active entries while training", caption=caption, caption_justify="left")
        for column in ("training", "seen", "active", "perplexity over dense", "in sample", "CETT"):
            table.add_column(column, justify="left" if column == "training" else "right")
        for name, checkpoints in self.by_name.items():
            for c in checkpoints:
                figures = c.figures
                table.add_row(
                    name,
                    f"{c.seen:,.0f} {c.unit}" if c.unit != ORDER else f"number {c.seen:g}",
                    percent(figures["mean_activation"]),
                    f"{figures['perplexity_ratio']:.4f}",
                    f"{figures['calibration_perplexity_ratio']:.4f}",
                    f"{figures['cett']:.4f}" if figures["cett"] is not None else "–",
                )
            table.add_section()
        return table

    def draw(self, title: str, path: Path) -> None:
        """
        Draw the share of active entries against how far checkpoints have been trained, with the laws.

        :raises OutputError: If matplotlib is missing or the file cannot be written.
        """
        figure = make_figure(path, (7, 4.5))
        panel = figure.subplots()
        for number, (name, group) in enumerate(self.by_name.items()):
            x = [c.seen for c in group]
            y = [100 * c.figures["mean_activation"] for c in group]
            panel.plot(x, y, "o", markersize=5, color=f"C{number}", label=name)
            if name in self.laws:
                law, ends = self.laws[name], [min(x) + (max(x) - min(x)) * i / 200 for i in range(201)]
                label = f"{law.form}, R² {law.r_squared:.2f}"
                panel.plot(ends, [100 * share for share in law.predict(ends)], color=f"C{number}", label=label)
        unit = ", ".join(dict.fromkeys(c.unit for c in self.checkpoints))
        panel.set(title=title, xlabel=unit, ylabel="active entries, mean over layers, %")
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
        save_figure(figure, path)

    def to_dict(self) -> dict[str, Any]:
        """Turn the series into what JSON can hold."""
        series = {}
        for name, checkpoints in self.by_name.items():
            law = self.laws.get(name)
            points = [{"folder": c.folder, "seen": c.seen, "unit": c.unit, **c.figures} for c in checkpoints]
            series[name] = {"checkpoints": points, "law": law.to_dict() if law else None}
        return {"settings": self.settings, "series": series}


def read_tokens(folder: Path, number: int) -> tuple[float, str]:
    """
    Tell how far a checkpoint has been trained.

    :return: A count and what it counts: tokens as trainer_state.json has them, steps as that or the folder's name has
        them, or the place.
    """
    state = read_json(folder / "trainer_state.json")
    for key, unit in (("num_input_tokens_seen", TOKENS), ("global_step", STEPS)):
        count = state.get(key) if isinstance(state, dict) else None
        if isinstance(count, int | float) and count > 0:
            return float(count), unit
    digits = re.findall(r"\d+", folder.name)
    return (float(digits[-1]), STEPS) if digits else (float(number), ORDER)

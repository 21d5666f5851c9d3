"""
Time decoding with OpenVINO, dense and accelerated: the cases and bars of the runtime.

    python benchmarks/decode_speed.py [--json FILE] [--only CASE ...] [--folder FOLDER]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bars import Bar, Measurement
from command import announce, make_plain_parser, run_benchmark

from actsparse.errors import ActsparseError


@dataclass(frozen=True)
class Case:
    """
    One call of `actsparse bench`, and the speed-ups it has to reach.

    :param arguments: The command line after `actsparse bench`.
    :param speedups: Least decoding speed-up of each sparsity, in the command's order.
    :param batches: Least speed-up of decoding so many sequences at once.
    :param has_prompts: Whether times to first token and memory have bars too.
    """

    arguments: tuple[str, ...]
    speedups: tuple[float, ...]
    batches: Mapping[int, float] = field(default_factory=dict)
    has_prompts: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        """The whole command line: what has no bar is left out, as far as it can be."""
        sizes = ",".join(map(str, self.batches)) or "1"
        prompts = PROMPT_LENGTHS if self.has_prompts else "32"
        return (*self.arguments, "--batch-sizes", sizes, "--prompt-lengths", prompts)


PROMPT_LENGTHS = "8,16,32,64,128,256,512,1024"
CASES = {
    "1b, all 50%": Case(
        ("1b", "--sparsity", "0.5", "--repetitions", "9"),
        (1.8,),
        batches={2: 1.3, 4: 1.25, 8: 1.15, 16: 1.05, 32: 1.0},
        has_prompts=True,
    ),
    "1b, all 5–70%": Case(("1b", "--sparsity", "0.05,0.1,0.3,0.4,0.6,0.7"), (1.05, 1.05, 1.4, 1.6, 2.1, 2.5)),
    "1b, up/gate 30% + down 50%": Case(
        ("1b", "--role", "ffn.up=0.3", "--role", "ffn.gate=0.3", "--role", "ffn.down=0.5"), (1.5,)
    ),
    "1b INT4, all 50%": Case(("1b", "--weights", "int4", "--sparsity", "0.5"), (1.9,)),
    "default, all 50%": Case(("default", "--sparsity", "0.5", "--tokens", "200"), (1.7,)),
}
# Over dense.
PROMPT_LIMIT = 1.0
MEMORY_LIMIT = 1.0


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """
    Run one case, or read its result if the folder has it.

    :param name: The case.
    :param folder: Where results are kept.
    :return: What `actsparse bench` wrote.
    """
    path = folder / f"{list(CASES).index(name)}.json"
    if not path.is_file():
        announce(name)
        command = [sys.executable, "-m", "actsparse", "bench", *CASES[name].command, "--json", str(path)]
        if subprocess.run(command).returncode != 0:
            message = f"actsparse bench fails for {name}"
            raise ActsparseError(message)
    return json.loads(path.read_text())


def make_bars(name: str, result: dict[str, Any]) -> list[Bar]:
    """
    Judge one case.

    :param name: The case.
    :param result: What `actsparse bench` wrote.
    :return: Its figures and bars.
    """
    case, bars = CASES[name], []
    for point, limit in zip(result["points"], case.speedups, strict=True):
        times = f"{point['dense']['decode_ms']['median']:.1f} ms over {point['sparse']['decode_ms']['median']:.1f} ms"
        measured = f"{point['measured_sparsity']:.1%} measured"
        title = f"{name}: decoding speed-up"
        if len(case.speedups) > 1:
            title += f" at {point['measured_sparsity']:.0%}"
        shares = [f"{point[side]['share_of_read_bandwidth']:.0%}" for side in ("dense", "sparse")]
        reading = f"{' and '.join(shares)} of the speed of reading all rows and half of them"
        bars.append(Bar(title, point["decode_speedup"], limit, True, note=f"{measured}, {times}; {reading}"))
    for size, limit in case.batches.items():
        bars.append(Bar(f"{name}: {size} sequences, speed-up", result["batch_speedup"][str(size)], limit, True))
    if case.has_prompts:
        for length, ratio in result["ttft_ratio"].items():
            bars.append(Bar(f"{name}: first token after {length}, over dense", ratio, PROMPT_LIMIT))
        ratio = result["sparse"]["peak_rss_mb"] / result["dense"]["peak_rss_mb"]
        bars.append(Bar(f"{name}: peak memory over dense", ratio, MEMORY_LIMIT))
    return bars


def measure(options: argparse.Namespace) -> Measurement:
    """
    Run the cases.

    :param options: The command line.
    :return: All figures and bars.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = {name: run_case(name, folder) for name in options.only}
    bars = tuple(bar for name, result in results.items() for bar in make_bars(name, result))
    settings = {name: result["settings"] for name, result in results.items()}
    return Measurement(bars, settings, {name: result["points"] for name, result in results.items()})


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Time decoding with OpenVINO, dense and accelerated.")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("--folder", type=Path, help="keep the results of single cases here, and use those it has")
    return run_benchmark("decode_speed", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

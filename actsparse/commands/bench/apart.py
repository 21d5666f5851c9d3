"""Models in processes of their own: for their peak memory, and because what is in one may end it."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import openvino as ov

from actsparse.commands.bench import decoder
from actsparse.commands.bench.decoder import Decoder, list_precisions, make_settings
from actsparse.errors import ActsparseError
from actsparse.runtime.progress import Say

Name = TypeVar("Name")

# The prompt that peak memory is measured with.
PREFILL_TOKENS = 512


class CrashError(ActsparseError):
    """A process died, and not by an error of its own."""


def run_apart(
    xml: Path, *, extension: Path | None, precision: str, threads: int, vocabulary: int = 2, prefill: int = 32
) -> int:
    """
    Run a model in a process of its own: read a prompt, then decode a few tokens.

    :param extension: The library that it needs, if it needs one.
    :param precision: f32 or bf16.
    :param prefill: How many tokens the prompt has.
    :return: The process's peak memory, in bytes.
    :raises CrashError: If a signal ends the process.
    :raises ActsparseError: If it fails.
    """
    job = {"xml": str(xml), "extension": str(extension or ""), "precision": precision, "threads": threads}
    job |= {"vocabulary": vocabulary, "prefill": prefill}
    # Without the working folder on its path: a module there is not the library of the same name.
    command = [sys.executable, "-P", "-m", decoder.__name__, json.dumps(job)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode < 0:
        ended_by = signal.Signals(-done.returncode).name
        msg = f"OpenVINO was ended by {ended_by} when it ran {xml.name} with {precision} on {threads} threads"
        raise CrashError(msg)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        msg = f"{xml.name} cannot be run in a process of its own: {reason}"
        raise ActsparseError(msg)
    return int(done.stdout.split()[-1])


def compile_decoders(
    core: ov.Core, models: Mapping[Name, Path], extension: Path | None, threads: int, say: Say
) -> dict[tuple[Name, str], Decoder]:
    """
    Compile each model once for each precision hint: which one is best is only known when both have run.

    Hints other than f32 are tried in a process of their own first, and left out where that dies: OpenVINO 2026.4 ends
    at a division by zero with f16 weights, bf16 and one thread.
    """
    decoders = {}
    for name, xml in models.items():
        for precision in list_precisions(core):
            try:
                if precision != "f32":
                    run_apart(xml, extension=extension, precision=precision, threads=threads)
            except CrashError as error:
                say(f"{name} is not timed with {precision}: {error}")
                continue
            decoders[name, precision] = Decoder(core, xml, make_settings(precision, threads))
    return decoders

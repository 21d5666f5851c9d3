"""Peak memory of a model, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

from actsparse.commands.bench.peak import PREFILL_TOKENS
from actsparse.errors import ActsparseError


def measure_peak_memory(
    xml: Path, *, extension: Path, precision: str, threads: int, vocabulary: int, max_length: int
) -> int:
    """
    Load a model in a new process, read 512 tokens, decode 16 more, and take that process's peak.

    :param xml: The model.
    :param extension: The extension's library.
    :param precision: f32 or bf16.
    :param threads: How many threads compute.
    :param vocabulary: How many tokens there are.
    :param max_length: How many tokens the model can read.
    :return: Bytes of resident memory.
    :raises ActsparseError: If the process fails.
    """
    job = {
        "xml": str(xml),
        "extension": str(extension),
        "precision": precision,
        "threads": threads,
        "vocabulary": vocabulary,
        "prefill": min(PREFILL_TOKENS, max_length // 2),
    }
    command = [sys.executable, "-m", "actsparse.commands.bench.peak", json.dumps(job)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        msg = f"the memory of {xml.name} cannot be measured: {reason}"
        raise ActsparseError(msg)
    return int(done.stdout.split()[-1])

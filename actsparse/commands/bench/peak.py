"""Run one model in a process of its own and print its peak memory; `python -m actsparse.commands.bench.peak`."""

import json
import sys
from pathlib import Path

import numpy as np

from actsparse.commands.bench.decoder import Decoder, make_core, make_settings
from actsparse.runtime.environment import peak_memory

PREFILL_TOKENS = 512
DECODE_TOKENS = 16


def main() -> None:
    """Print bytes. The argument is JSON: xml, extension, precision, threads and vocabulary."""
    job = json.loads(sys.argv[1])
    settings = make_settings(job["precision"], job["threads"])
    decoder = Decoder(make_core(job["extension"]), Path(job["xml"]), settings)
    tokens = np.random.default_rng(0).integers(0, job["vocabulary"], (1, job["prefill"] + DECODE_TOKENS))
    decoder.start()
    decoder.feed(tokens[:, : job["prefill"]])
    for i in range(job["prefill"], tokens.shape[1]):
        decoder.feed(tokens[:, i : i + 1])
    print(peak_memory())


if __name__ == "__main__":
    main()

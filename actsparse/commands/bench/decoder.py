"""
Run a compiled language model token by token.

As a program, it prints a model's peak memory: so it imports neither torch nor NNCF, which would count too.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from actsparse.runtime.environment import peak_memory

_DECODED_TOKENS = 16
INPUTS = {"input_ids", "attention_mask", "position_ids", "beam_idx"}


def make_core(extension: Path | str) -> ov.Core:
    """Make an OpenVINO core that knows the extension's operations; without a path, one that does not."""
    core = ov.Core()
    if extension:
        core.add_extension(str(extension))
    return core


def make_settings(precision: str, threads: int) -> dict[str, Any]:
    """
    Return how a model is compiled.

    :param precision: f32 or bf16.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }


def list_precisions(core: ov.Core) -> tuple[str, ...]:
    """
    List the precision hints that the processor computes in.

    :return: The hints, f32 first.
    """
    capabilities: Any = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("f32", "bf16") if "BF16" in capabilities else ("f32",)


def name_processor(core: ov.Core) -> str:
    """Name the processor."""
    return str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()


class Decoder:
    """Sequences of one length that grow token by token."""

    def __init__(self, core: ov.Core, model: ov.Model | Path, settings: dict[str, Any]) -> None:
        compiled = core.compile_model(model, "CPU", settings)
        self._inputs = {port.get_any_name() for port in compiled.inputs}
        self._request = compiled.create_infer_request()
        self._length = 0

    def start(self) -> None:
        """Forget everything: the next token is the first."""
        self._request.reset_state()
        self._length = 0

    def feed(self, tokens: np.ndarray) -> None:
        """
        Compute the logits of the next tokens.

        :param tokens: [sequences, tokens]; as many sequences as at the start.
        """
        count, end = len(tokens), self._length + tokens.shape[1]
        arrays = {
            "input_ids": tokens,
            "attention_mask": np.ones((count, end), np.int64),
            "position_ids": np.tile(np.arange(self._length, end), (count, 1)),
            "beam_idx": np.arange(count, dtype=np.int32),
        }
        self._request.infer({name: arrays[name] for name in self._inputs})
        self._length = end

    def output(self, index: int) -> np.ndarray:
        """Return an output of the last tokens."""
        return self._request.get_output_tensor(index).data


def find_unknown_inputs(names: Iterable[str]) -> list[str]:
    """Find the inputs that a `Decoder` cannot make."""
    return sorted(set(names) - INPUTS)


def main() -> None:
    """Print bytes. The argument is JSON: xml, extension, precision, threads, vocabulary and prefill."""
    job = json.loads(sys.argv[1])
    settings = make_settings(job["precision"], job["threads"])
    decoder = Decoder(make_core(job["extension"]), Path(job["xml"]), settings)
    tokens = np.random.default_rng(0).integers(0, job["vocabulary"], (1, job["prefill"] + _DECODED_TOKENS))
    decoder.start()
    decoder.feed(tokens[:, : job["prefill"]])
    for i in range(job["prefill"], tokens.shape[1]):
        decoder.feed(tokens[:, i : i + 1])
    print(peak_memory())


if __name__ == "__main__":
    main()

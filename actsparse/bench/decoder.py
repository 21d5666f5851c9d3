"""Run a compiled language model token by token. Imports nothing heavy: a process of its own measures its memory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

INPUTS = {"input_ids", "attention_mask", "position_ids", "beam_idx"}


def make_core(extension: Path | str) -> ov.Core:
    """
    Make an OpenVINO core that knows the extension's operations.

    :param extension: The extension's library.
    :return: The core.
    """
    core = ov.Core()
    core.add_extension(str(extension))
    return core


def make_settings(precision: str, threads: int) -> dict[str, Any]:
    """
    Return how a model is compiled.

    :param precision: f32 or bf16.
    :param threads: How many threads compute.
    :return: OpenVINO's properties.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }


class Decoder:
    """
    A sequence that grows token by token.

    :param core: An OpenVINO core.
    :param model: A stateful model, or its XML file.
    :param settings: OpenVINO's properties.
    """

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

        :param tokens: [1, tokens].
        """
        end = self._length + tokens.shape[1]
        arrays = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._length, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: arrays[name] for name in self._inputs})
        self._length = end

    def output(self, index: int) -> np.ndarray:
        """
        Return an output of the last tokens.

        :param index: Its number.
        :return: The output, valid until the next tokens.
        """
        return self._request.get_output_tensor(index).data


def find_unknown_inputs(names: Iterable[str]) -> list[str]:
    """
    Find the inputs that a `Decoder` cannot make.

    :param names: A model's inputs.
    :return: The unknown ones, sorted.
    """
    return sorted(set(names) - INPUTS)

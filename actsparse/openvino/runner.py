"""Run an OpenVINO model on the CPU, one batch after the other."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import torch

from actsparse.openvino.inputs import make_inputs

# The plugin's faster defaults (bf16, INT8 activations, an INT8 cache) would be measured along with the masks.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class Runner:
    """
    Run a model, each batch as a new sequence.

    :param config: The plugin's properties; what is not named there is as the plugin chooses. By default all is fp32.
    """

    def __init__(self, model: ov.Model, config: Mapping[str, Any] = EXACT) -> None:
        self._compiled = ov.Core().compile_model(model, "CPU", dict(config))
        self._request = self._compiled.create_infer_request()

    @property
    def vocabulary_size(self) -> int | None:
        """How many logits a token has, where the model says it: OpenVINO does not refuse tokens beyond."""
        logits = next((port for port in self._compiled.outputs if "logits" in port.get_names()), None)
        shape = logits.get_partial_shape() if logits is not None else None
        is_known = shape is not None and shape.rank.is_static and len(shape) > 0 and shape[-1].is_static
        return shape[-1].get_length() if shape is not None and is_known else None

    def run(self, batch: Any) -> dict[str, np.ndarray]:
        """
        Run one batch.

        :param batch: A model input; what is missing is made by `make_inputs`.
        :return: The outputs by name, valid until the next run.
        """
        self._request.reset_state()
        self._request.infer(make_inputs(self._compiled, batch))
        return {
            name: self._request.get_output_tensor(i).data
            for i, port in enumerate(self._compiled.outputs)
            for name in port.get_names() or {str(i)}
        }


class OpenVinoLanguageModel:
    """Look like a transformers model that gives logits."""

    def __init__(self, runner: Any, config: Any = None) -> None:
        self._runner = runner
        self.config = config or SimpleNamespace(vocab_size=runner.vocabulary_size)

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """
        Compute logits.

        :param input_ids: Tokens, [sequences, tokens].
        :return: `.logits`, [sequences, tokens, vocabulary]; None where the model has no such output.
        """
        outputs = self._runner.run({"input_ids": input_ids})
        logits = outputs.get("logits", next(iter(outputs.values())) if len(outputs) == 1 else None)
        return SimpleNamespace(logits=None if logits is None else torch.from_numpy(np.array(logits)))

"""Count zeros behind the masks of an OpenVINO model."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from actsparse.calibration import run_each
from actsparse.openvino.graph_masks import GraphMask, find_masks
from actsparse.openvino.layers import measure_sizes, named_calls
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import OpenVinoLanguageModel, Runner
from actsparse.sparsity_report import ZeroCounter

_COUNT = "actsparse.nonzero."


class OpenVinoZeroCounter(ZeroCounter):
    """Count zeros behind a model's masks while a copy of it runs."""

    def __init__(self, model: ov.Model, config: Any = None) -> None:
        names = {call.name: name for name, calls in named_calls(model).items() for call in calls}
        counted = model.clone()
        self._graph_masks = find_masks(counted)
        self._layers = [[names[linear.name] for linear in mask.linears] for mask in self._graph_masks]
        outputs = [_count_nonzero(mask, i) for i, mask in enumerate(self._graph_masks)]
        if outputs:
            counted.add_outputs(outputs)
        self._runner = Runner(counted)
        self.vocabulary_size = self._runner.vocabulary_size
        super().__init__(OpenVinoLanguageModel(self, config), masks_of(model), measure_sizes(model))

    def run_batches(self, batches: Iterable[Any], *, total: int | None, description: str) -> int:
        """Run every batch; see `ZeroCounter`."""
        return run_each(self.run, batches, total=total, description=description)

    def run(self, batch: Any) -> dict[str, np.ndarray]:
        """Run one batch and count."""
        outputs = self._runner.run(batch)
        for i, (mask, layers) in enumerate(zip(self._graph_masks, self._layers, strict=True)):
            counts = outputs.pop(f"{_COUNT}{i}")
            entries = counts.size * mask.channels
            for layer in layers:
                self.add(layer, entries - int(counts.sum(dtype=np.int64)), entries)
        return outputs


def _count_nonzero(mask: GraphMask, number: int) -> ov.Output:
    # One sum for each token: small enough for any integer type, and summed up in numpy.
    zero = ops.constant(np.zeros([], np.float32), dtype=mask.select.get_output_element_type(0))
    nonzero = ops.convert(ops.not_equal(mask.select, zero), ov.Type.i32)
    counts = ops.reduce_sum(nonzero, np.array(-1), keep_dims=False)
    counts.output(0).get_tensor().set_names({f"{_COUNT}{number}"})
    return counts.output(0)

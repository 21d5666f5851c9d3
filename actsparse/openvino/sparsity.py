"""Count zeros behind the masks of an OpenVINO model."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from actsparse import distributed
from actsparse.errors import ActsparseError
from actsparse.evaluation.sparsity import LayerSparsity, SparsityReport
from actsparse.openvino.layers import named_calls
from actsparse.openvino.masks import Mask, find_masks
from actsparse.openvino.placement import masks_of
from actsparse.openvino.runner import OpenVinoLanguageModel, Runner

_COUNT = "actsparse.nonzero."


class OpenVinoSparsityCounter:
    """
    Count zeros behind a model's masks while a copy of it runs.

    :param model: The masked model.
    :param config: Its transformers configuration, if there is one.
    """

    def __init__(self, model: ov.Model, config: Any = None) -> None:
        self._original = model
        counted = model.clone()
        self._masks = find_masks(counted)
        outputs = [_count_nonzero(mask, i) for i, mask in enumerate(self._masks)]
        if outputs:
            counted.add_outputs(outputs)
        self._runner = Runner(counted)
        self._nonzero = np.zeros(len(self._masks), np.int64)
        self._entries = np.zeros(len(self._masks), np.int64)
        self.vocabulary_size = self._runner.vocabulary_size
        self.model = OpenVinoLanguageModel(self, config)

    def run(self, batch: Any) -> dict[str, np.ndarray]:
        """
        Run one batch and count.

        :param batch: A model input.
        :return: The model's outputs by name.
        """
        outputs = self._runner.run(batch)
        for i, mask in enumerate(self._masks):
            counts = outputs.pop(f"{_COUNT}{i}")
            self._nonzero[i] += int(counts.sum(dtype=np.int64))
            self._entries[i] += counts.size * mask.channels
        return outputs

    def report(self) -> SparsityReport:
        """
        Sum up what was counted.

        :return: The measured sparsity.
        :raises ActsparseError: If nothing was run.
        """
        nonzeros, all_entries = self._nonzero.copy(), self._entries.copy()
        for counts in (nonzeros, all_entries):
            distributed.add_up_array(counts)
        if not all_entries.all():
            msg = "the sparsity of the OpenVINO model cannot be measured: no data went through it"
            raise ActsparseError(msg)
        names = {call.name: name for name, calls in named_calls(self._original).items() for call in calls}
        zeros: dict[str, list[int]] = {}
        for mask, nonzero, entries in zip(self._masks, nonzeros, all_entries, strict=True):
            for linear in mask.linears:
                counts = zeros.setdefault(names[linear.name], [0, 0])
                counts[0] += int(entries - nonzero)
                counts[1] += int(entries)
        return self._report({name: zero / entries for name, (zero, entries) in zeros.items()})

    def _report(self, sparsity: dict[str, float]) -> SparsityReport:
        calls = {name: found[0] for name, found in named_calls(self._original).items()}
        weight_bytes = {name: call.weight_bytes for name, call in calls.items()}
        extra: dict[str, float] = {}
        for mask in self._masks:
            outputs = sum(linear.out_features for linear in mask.linears)
            size = sum(linear.weight_bytes for linear in mask.linears)
            reads = mask.stand_in.reads(mask.linears[0].in_features, outputs, size)
            extra |= {linear.name: reads for linear in mask.linears}
        layers: list[LayerSparsity] = []
        masks = masks_of(self._original)
        for name, mask in masks.items():
            record = mask.record
            site, roles, target = (record.site, record.roles, record.target_sparsity) if record else (name, (), None)
            layers.append(
                LayerSparsity(name, site, roles, target, sparsity[name] - extra[calls[name].name], weight_bytes[name])
            )
        tokens = "+".join(sorted({mask.tokens for mask in masks.values()}))
        return SparsityReport(tuple(layers), sum(weight_bytes.values()), tokens)


def _count_nonzero(mask: Mask, number: int) -> ov.Output:
    # One sum for each token: small enough for any integer type, and summed up in numpy.
    zero = ops.constant(np.zeros([], np.float32), dtype=mask.select.get_output_element_type(0))
    nonzero = ops.convert(ops.not_equal(mask.select, zero), ov.Type.i32)
    counts = ops.reduce_sum(nonzero, np.array(-1), keep_dims=False)
    counts.output(0).get_tensor().set_names({f"{_COUNT}{number}"})
    return counts.output(0)

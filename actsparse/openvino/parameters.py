"""Find what an OpenVINO model stores for the parameters of the torch modules that it was converted from."""

from collections.abc import Iterator

import numpy as np
import openvino as ov
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear, find_weight_constant, module_of_node
from actsparse.openvino.weights import dequantise

# What a vector meets in the graph, by the name that torch's norms, layers and rotary embeddings have for it. (NNCF
# compresses frequencies too, where it does not recognise the embedding.)
_VECTORS = {"Multiply": "weight", "Add": "bias", "MatMul": "inv_freq"}
# What NNCF's AWQ calls the scale that it could merge into no weight; it stands behind an activation function.
_AWQ = "/awq_mul"


class StoredParameters:
    """
    The parameters of an OpenVINO model, decompressed, by torch module.

    Constants of vectors have lost their names in the conversion: they are told by the module of the node that reads
    them.

    :param model: A model without masks.
    """

    def __init__(self, model: ov.Model) -> None:
        self._model = model
        self._linears = named_calls(model)
        self._tables: dict[str, ov.Output] = {}
        self._vectors: dict[tuple[str, str], list[ov.Output]] = {}
        self._read: dict[tuple[str, tuple[int, ...]], nn.Parameter] = {}
        for node in model.get_ordered_ops():
            module = module_of_node(node.get_friendly_name())
            if module is not None:
                self._note(module, node)

    def read(self, name: str, module: nn.Module, kind: str) -> nn.Parameter | None:
        """
        Read a parameter, or the frequencies of a rotary embedding.

        :param name: The module's name.
        :param kind: The tensor's name in the module.
        :return: The values in f32, one object for modules that share them; None where the model does not show them.
        :raises UnsupportedWeightsError: If they are stored in a way that is not known.
        """
        shape = tuple(getattr(module, kind).shape)
        output = self._find(name, kind, shape)
        if output is None:
            return None
        constant = find_weight_constant(output)
        # A head that is tied to an embedding stays tied.
        key = (constant.get_friendly_name() if constant else output.get_node().get_friendly_name(), shape)
        if key not in self._read:
            values = dequantise(output)
            calls = self._linears.get(name, ()) if kind == "weight" else ()
            if calls and calls[0].is_weight_transposed == isinstance(module, Conv1D):
                values = np.ascontiguousarray(values.T)
            if values.size != np.prod(shape):
                return None
            self._read[key] = nn.Parameter(torch.from_numpy(values.reshape(shape)), requires_grad=False)
        return self._read[key]

    def awq_scales(self) -> Iterator[tuple[str, torch.Tensor]]:
        """
        List the scales that AWQ put behind activation functions.

        :return: The node of each function, and what its output is multiplied by, [channels].
        """
        for node in self._model.get_ordered_ops():
            if node.get_type_name() == "Multiply" and node.get_friendly_name().endswith(_AWQ):
                source = node.input_value(0).get_node().get_friendly_name()
                yield source, torch.from_numpy(dequantise(node.input_value(1)).reshape(-1))

    def _note(self, module: str, node: ov.Node) -> None:
        kind = node.get_type_name()
        if kind == "Gather" and find_weight_constant(node.input_value(0)) is not None:
            self._tables[module] = node.input_value(0)
        if kind in _VECTORS and not node.get_friendly_name().endswith(_AWQ):
            constants = [value for value in node.input_values() if find_weight_constant(value) is not None]
            self._vectors.setdefault((module, _VECTORS[kind]), []).extend(constants)

    def _find(self, name: str, kind: str, shape: tuple[int, ...]) -> ov.Output | None:
        if kind == "weight" and name in self._linears:
            return _weight_of(self._linears[name][0])
        if kind == "weight" and len(shape) == 2:
            return self._tables.get(name)
        vectors = self._vectors.get((name, kind), [])
        fitting = [vector for vector in vectors if int(np.prod(list(vector.get_shape()))) == np.prod(shape)]
        return fitting[0] if len(shape) == 1 and len(fitting) == 1 else None


def _weight_of(linear: Linear) -> ov.Output:
    return linear.node.input_value(linear.weight_port)

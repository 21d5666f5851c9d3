"""The Linear layers that a model calls, and those that one target sparsity applies to."""

from collections.abc import Callable
from typing import Any

import nncf
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from actsparse.torch.layers import block_layers, find_layers, in_features, out_features, trace_graph
from actsparse.torch.wrappers import named_linears

HEADS = {"lm_head", "embed_out", "cls.predictions.transform.dense", "cls.predictions.decoder"}


def names_of(layers: Any) -> list[str]:
    return [layer.name for layer in layers]


@pytest.mark.parametrize("is_compressed", [False, True], ids=["dense", "INT8"])
def test_every_linear_layer_is_found_once_with_its_nodes_and_channels(
    architecture: str, is_compressed: bool, make_model: Any, batches: list[Any], compress: Callable[..., Any]
) -> None:
    model = make_model(architecture)
    expected = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    model = compress(model) if is_compressed else model
    graph = trace_graph(model, batches[0])
    layers = find_layers(model, graph)
    assert sorted(names_of(layers)) == sorted(expected)
    nodes = [node for layer in layers for node in layer.nodes]
    assert len(set(nodes)) == len(nodes) == len(layers)
    assert all(graph.get_node_by_name(node) for node in nodes)
    for layer in layers:
        module = model.get_submodule(layer.name)
        is_transposed = isinstance(module, Conv1D)
        shape = (in_features(module), out_features(module))
        assert (shape if is_transposed else shape[::-1]) == expected[layer.name]


def test_block_layers_are_all_but_the_heads(architecture: str, make_model: Any, batches: list[Any]) -> None:
    model = make_model(architecture)
    layers = find_layers(model, trace_graph(model, batches[0]))
    assert set(names_of(block_layers(model, layers))) == set(names_of(layers)) - HEADS


def test_a_model_without_blocks_gives_all_its_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    layers = find_layers(model, trace_graph(model, torch.ones(2, 4)))
    assert names_of(block_layers(model, layers)) == ["0", "2"]


def test_a_tied_head_is_not_taken_for_the_embedding(make_model: Any, batches: list[Any]) -> None:
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert names_of(find_layers(model, trace_graph(model, batches[0])))[-1] == "lm_head"


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_layers_that_share_a_weight_are_told_apart() -> None:
    model = Tied()
    assert names_of(find_layers(model, trace_graph(model, torch.ones(1, 4)))) == ["a", "b"]


def test_a_layer_that_is_never_called_is_not_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    model[1].add_module("unused", nn.Linear(4, 4))
    assert names_of(find_layers(model, trace_graph(model, torch.ones(1, 4)))) == ["0"]
    assert [name for name, _ in named_linears(model)] == ["0", "1.unused"]


def test_matrix_products_of_activations_and_of_bare_parameters_are_no_layers() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) @ x.transpose(-1, -2) @ x @ self.weight

    model = Products()
    assert names_of(find_layers(model, trace_graph(model, torch.ones(1, 2, 4)))) == ["layer"]


def test_tracing_gives_nncfs_graph_and_leaves_the_model_as_it_was(llama: Any, batches: list[Any]) -> None:
    before = [(name, dict(module.__dict__)) for name, module in llama.named_modules()]
    graph = trace_graph(llama, batches[0])
    assert [(name, dict(module.__dict__)) for name, module in llama.named_modules()] == before
    wrapped = nncf.torch.wrap_model(llama, example_input=batches[0], trace_parameters=True)
    theirs = nncf.build_graph(wrapped)
    assert {n.node_name for n in graph.get_all_nodes()} == {n.node_name for n in theirs.get_all_nodes()}

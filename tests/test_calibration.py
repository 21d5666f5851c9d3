"""Running data through a model: every kind of input, and the model as it was afterwards."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nncf
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from actsparse.calibration import CalibrationBatches, describe_batch
from actsparse.errors import DatasetError, one_line
from actsparse.torch.running import evaluation_mode, run_batches, run_model


class Sum(nn.Module):
    """Remember the inputs, which are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.seen: list[float] = []
        self.modes: list[bool] = []
        self.gradients: list[bool] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor | float = 0.0) -> torch.Tensor:
        total = (x + y).sum()
        self.seen.append(total.item())
        self.modes.append(self.dropout.training)
        self.gradients.append(torch.is_grad_enabled())
        return total


ONE = torch.ones(1)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([ONE, 2 * ONE])


@dataclass(frozen=True)
class DatasetCase:
    """A dataset and the inputs that it gives."""

    name: str
    make: Any
    length: int | None
    sums: tuple[float, ...]


DATASETS = [
    DatasetCase("tensors", lambda: [ONE, 2 * ONE], 2, (1.0, 2.0)),
    DatasetCase("tuples", lambda: [(ONE, ONE), (ONE, 2 * ONE)], 2, (2.0, 3.0)),
    DatasetCase("dicts", lambda: [{"x": ONE, "y": 1.0}], 1, (2.0,)),
    DatasetCase("other mappings", lambda: [OrderedDict(x=ONE)], 1, (1.0,)),
    DatasetCase("a mixture", lambda: [ONE, (ONE,), {"x": ONE}], 3, (1.0, 1.0, 1.0)),
    DatasetCase("a tuple of batches", lambda: (ONE, ONE), 2, (1.0, 1.0)),
    DatasetCase("a generator", lambda: (i * ONE for i in range(3)), None, (0.0, 1.0, 2.0)),
    DatasetCase("nncf.Dataset", lambda: nncf.Dataset([ONE, ONE]), 2, (1.0, 1.0)),
    DatasetCase("nncf.Dataset that transforms", lambda: nncf.Dataset([1.0, 2.0], lambda x: x * ONE), 2, (1.0, 2.0)),
    DatasetCase("nncf.Dataset of a generator", lambda: nncf.Dataset(i * ONE for i in range(2)), None, (0.0, 1.0)),
    DatasetCase("DataLoader", lambda: DataLoader([1.0, 2.0, 3.0], batch_size=2), 2, (3.0, 3.0)),  # pyright: ignore
    DatasetCase("DataLoader of a stream", lambda: DataLoader(Stream(), batch_size=None), None, (1.0, 2.0)),
    DatasetCase("nncf.Dataset of a stream", lambda: nncf.Dataset(DataLoader(Stream())), None, (1.0, 2.0)),
]


@pytest.mark.parametrize("case", DATASETS, ids=lambda case: case.name)
def test_every_kind_of_dataset_is_run_once_in_order(case: DatasetCase) -> None:
    model = Sum()
    batches = CalibrationBatches(case.make())
    assert batches.length == case.length
    assert run_batches(model, batches, total=batches.length, description="running") == len(case.sums)
    assert tuple(model.seen) == case.sums


def test_the_first_batch_is_read_without_running_anything() -> None:
    read: list[int] = []

    def generate() -> Iterator[torch.Tensor]:
        for number in range(3):
            read.append(number)
            yield number * ONE

    batches = CalibrationBatches(generate())
    assert (batches.first.item(), read) == (0.0, [0])


@pytest.mark.parametrize("dataset", [[], (), iter(()), nncf.Dataset([])], ids=lambda value: type(value).__name__)
def test_an_empty_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(DatasetError, match="the calibration dataset is empty"):
        CalibrationBatches(dataset)


@pytest.mark.parametrize("dataset", [torch.ones(2, 3), "text", b"text", {"input_ids": ONE}, None, 3, nn.Identity()])
def test_what_is_no_dataset_is_refused_by_its_type(dataset: Any) -> None:
    message = f"the dataset must be an nncf.Dataset or an iterable of model inputs, not {type(dataset).__name__}"
    with pytest.raises(DatasetError, match=message):
        CalibrationBatches(dataset)


def test_the_batch_that_the_model_cannot_take_is_named_with_its_shapes() -> None:
    batches = [(torch.ones(2, 3), torch.ones(2, 3)), (torch.ones(2, 3), torch.ones(4, 5))]
    message = r"the model cannot take batch 1 of the dataset \(\(2, 3\), \(4, 5\)\): RuntimeError: The size of tensor"
    with pytest.raises(DatasetError, match=message) as caught:
        run_batches(Sum(), batches, total=2, description="running")
    assert "\n" not in str(caught.value)


def test_an_error_of_the_dataset_itself_is_not_hidden() -> None:
    def generate() -> Iterator[torch.Tensor]:
        yield ONE
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        run_batches(Sum(), CalibrationBatches(generate()), total=None, description="running")


def test_batches_run_in_evaluation_mode_without_gradients_and_modes_come_back() -> None:
    model = Sum()
    model.eval()
    model.dropout.train()
    run_batches(model, [ONE], total=1, description="running")
    assert (model.modes, model.gradients) == ([False], [False])
    assert (model.training, model.dropout.training) == (False, True)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_modes_come_back_whatever_happens(error: type[BaseException]) -> None:
    model = Sum()
    model.eval()
    model.dropout.train()
    with pytest.raises(error), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise error
    assert (model.training, model.dropout.training) == (False, True)


@dataclass(frozen=True)
class BatchCase:
    """A batch and what an error says it is."""

    batch: Any
    description: str


BATCHES = [
    BatchCase(torch.ones(2, 3), "tensor of shape (2, 3)"),
    BatchCase({"input_ids": torch.ones(1, 4), "use_cache": True}, "input_ids: (1, 4), use_cache: bool"),
    BatchCase((torch.ones(2), None), "(2,), NoneType"),
    BatchCase({}, "empty dict"),
    BatchCase((), "empty tuple"),
    BatchCase("text", "str"),
    BatchCase([ONE], "list"),
]


@pytest.mark.parametrize("case", BATCHES, ids=lambda case: case.description)
def test_a_batch_is_described_by_its_shapes(case: BatchCase) -> None:
    assert describe_batch(case.batch) == case.description


def test_inputs_are_passed_as_nncf_passes_them() -> None:
    from nncf.torch.engine import PTEngine

    for batch in (ONE, (ONE, 2 * ONE), {"x": ONE, "y": 3.0}):
        assert torch.equal(run_model(Sum(), batch), PTEngine(Sum()).infer(batch))


def test_an_error_becomes_one_short_line() -> None:
    assert one_line(ValueError("first\n  second")) == "ValueError: first second"
    assert len(one_line(ValueError("word " * 1000))) <= 260


def test_nothing_is_printed_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    run_batches(Sum(), [ONE], total=1, description="running")
    assert capfd.readouterr() == ("", "")

"""Measure the sparsity of a masked model on data."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from actsparse.backend import backend_of
from actsparse.calibration import CalibrationBatches
from actsparse.errors import ActsparseError
from actsparse.sparsity_report import SparsityReport, ZeroCounter


def count_zeros(model: Any) -> AbstractContextManager[ZeroCounter]:
    """
    Count zeros behind a model's masks while it runs, for example inside `word_perplexity`.

    :param model: The masked model, of torch or OpenVINO.
    :return: A context with the counter. What runs is its `model`; ask it for its report afterwards.
    """
    return backend_of(model).count_zeros()


def measure_sparsity(model: Any, dataset: Iterable[Any]) -> SparsityReport:
    """
    Measure a masked model's sparsity on data.

    :param model: The masked torch module, `openvino.Model` or optimum-intel model.
    :param dataset: Model inputs, as for `sparsify_activations`.
    :return: The share of zeros by layer and role, and the share of weight reads that they make unnecessary.
    :raises ActsparseError: If the model has no masks.
    :raises DatasetError: If the dataset is empty or does not fit the model.
    """
    with count_zeros(model) as counter:
        if not counter.has_masks:
            msg = "the model has no activation sparsifiers to measure"
            raise ActsparseError(msg)
        batches = CalibrationBatches(dataset)
        counter.run_batches(batches.share(), total=batches.share_length, description="measuring sparsity")
    return counter.report()

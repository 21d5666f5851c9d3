"""A torch model dense, sparse, and with NNCF's own masks."""

import copy
import time
from typing import Any

import numpy as np

from actsparse.commands.regression.figures import DENSE, NNCF, SPARSE
from actsparse.commands.regression.nncf_reference import (
    count_nncf_zeros,
    find_layer_names,
    sparsify_with_nncf,
    translate_targets,
)
from actsparse.commands.regression.sides import Sides
from actsparse.commands.regression.subject import Subject
from actsparse.evaluation.sparsity import count_zeros
from actsparse.torch.layers import weight_bytes


def measure_torch(subject: Subject) -> Sides:
    """
    Measure a torch model.

    :param subject: The model and its data; comes back masked.
    :return: Its sides.
    :raises ActsparseError: If the model does not take what the case asks for.
    """
    subject.say("evaluating the dense model")
    tokens, dense = subject.score(subject.model, "dense")
    losses = {DENSE: dense}
    seconds = subject.time_forward()
    nncf: dict[str, Any] = {}
    if subject.case.nncf:
        losses[NNCF], nncf["nncf_sparsity"], nncf["nncf_seconds"] = _measure_nncf(subject)
    calibration_seconds = subject.sparsify()
    subject.say("evaluating the sparse model")
    with count_zeros(subject.model) as counter:
        _, losses[SPARSE] = subject.score(counter.model, "sparse")
    return Sides(tokens, losses, counter.report(), seconds, calibration_seconds, **nncf)


def _measure_nncf(subject: Subject) -> tuple[np.ndarray, float, float]:
    case, example = subject.case, subject.batches[0]
    subject.say("calibrating NNCF's masks")
    layer_names = find_layer_names(subject.model, example)
    targets = translate_targets(subject.model, example, case.scopes, case.ignored_scope)
    bytes_of = {node: weight_bytes(subject.model.get_submodule(name)) for node, name in layer_names.items()}
    model = copy.deepcopy(subject.model)
    start = time.perf_counter()
    model = sparsify_with_nncf(model, subject.batches, targets)
    seconds = time.perf_counter() - start
    subject.say("evaluating with NNCF's masks")
    with count_nncf_zeros(model) as shares:
        _, losses = subject.score(model, "NNCF")
    masked = shares()
    total = sum(bytes_of[node] for node in masked)
    return losses, sum(share * bytes_of[node] for node, share in masked.items()) / total, seconds

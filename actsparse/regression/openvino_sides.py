"""An OpenVINO model dense and accelerated; sparsity is counted in the portable graph, whose masks can be seen."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from actsparse import assets
from actsparse.errors import ActsparseError
from actsparse.evaluation.sparsity import count_zeros
from actsparse.openvino.acceleration import accelerate
from actsparse.openvino.detect import MODEL_FILE, find_openvino_model
from actsparse.openvino.export import export_model
from actsparse.regression.decoding import measure_decode_ratio
from actsparse.regression.figures import DENSE, SPARSE
from actsparse.regression.losses import measure_losses
from actsparse.regression.sides import Sides
from actsparse.regression.subject import Subject


def measure_openvino(subject: Subject) -> Sides:
    """
    Measure the accelerated form of a model, as `deploy_model` makes it.

    :param subject: The model, of torch or OpenVINO, and its data; comes back masked.
    :return: Its sides.
    :raises ActsparseError: If the model does not take what the case asks for, or the kernel runs none of its layers.
    """
    with assets.partial_folder() as folder:
        dense = _convert(subject, folder / "dense")
        forward_seconds = subject.time_forward()
        calibration_seconds = subject.sparsify()
        sparse = _convert(subject, folder / "sparse")
        accelerated = sparse.clone()
        acceleration = accelerate(accelerated)
        if not acceleration.masked:
            msg = f"the kernel runs none of the masked layers: {acceleration.kept[0].reason}"
            raise ActsparseError(msg)
        subject.say("evaluating the dense and the accelerated model")
        tokens, dense_losses = _score(subject, dense, "dense")
        _, losses = _score(subject, accelerated, "accelerated")
        subject.say("counting zeros")
        with count_zeros(sparse) as counter:
            _score_with(subject, counter.model, "counting zeros")
        ratio = None
        if subject.case.decode:
            subject.say("timing decoding, dense and accelerated turn by turn")
            ratio = measure_decode_ratio(subject, dense, accelerated, folder)
    operations = Counter(site.operation for site in acceleration.masked for _ in site.layers)
    return Sides(
        tokens,
        {DENSE: dense_losses, SPARSE: losses},
        counter.report(),
        forward_seconds,
        calibration_seconds,
        decode_ratio=ratio,
        details={
            "accelerated_layers": dict(operations),
            "kept_layers": sum(len(site.layers) for site in acceleration.kept),
        },
    )


def _convert(subject: Subject, folder: Path) -> ov.Model:
    openvino_model = find_openvino_model(subject.model)
    if openvino_model is not None:
        return openvino_model.clone()
    subject.say("converting the model to OpenVINO")
    export_model(subject.model, folder)
    return ov.Core().read_model(folder / MODEL_FILE)


def _score(subject: Subject, model: ov.Model, description: str) -> tuple[np.ndarray, np.ndarray]:
    # The counter's model is what gives logits; where there are no masks it counts nothing.
    with count_zeros(model) as counter:
        return _score_with(subject, counter.model, description)


def _score_with(subject: Subject, model: Any, description: str) -> tuple[np.ndarray, np.ndarray]:
    return measure_losses(
        model, subject.tokenizer, subject.pages, max_length=subject.max_length, description=description
    )

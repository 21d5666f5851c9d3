"""An OpenVINO model dense and accelerated; sparsity is counted in the portable graph, whose masks can be seen."""

from collections import Counter
from pathlib import Path

import openvino as ov

from actsparse.backend import backend_of
from actsparse.commands.regression.decoding import measure_decode_ratio
from actsparse.commands.regression.figures import DENSE, SPARSE
from actsparse.commands.regression.sides import Sides
from actsparse.commands.regression.subject import Subject
from actsparse.errors import ActsparseError
from actsparse.evaluation.sparsity import count_zeros
from actsparse.openvino.acceleration import accelerate
from actsparse.openvino.export import export_model
from actsparse.openvino.folder import MODEL_FILE
from actsparse.storage import assets


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
        tokens, dense_losses = subject.score(dense, "dense")
        _, losses = subject.score(accelerated, "accelerated")
        subject.say("counting zeros")
        with count_zeros(sparse) as counter:
            subject.score(counter.model, "counting zeros")
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
    if backend_of(subject.model).name == "openvino":
        return subject.model.clone()
    subject.say("converting the model to OpenVINO")
    export_model(subject.model, folder)
    return ov.Core().read_model(folder / MODEL_FILE)

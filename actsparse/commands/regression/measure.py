"""Measure one regression case."""

from datetime import UTC, datetime
from typing import Any

from actsparse.commands.regression.case import Case
from actsparse.commands.regression.figures import CaseResult, Figure, Windows, in_order, loss_figures
from actsparse.commands.regression.identity import find_inputs
from actsparse.commands.regression.sides import Sides
from actsparse.commands.regression.subject import Say, prepare_subject
from actsparse.commands.regression.torch_sides import measure_torch
from actsparse.evaluation.word_perplexity import count_words
from actsparse.runtime.environment import describe_environment, describe_machine, peak_memory
from actsparse.sparsity_report import SparsityReport


def measure_case(case: Case, say: Say) -> CaseResult:
    """
    Measure a case in this process, whose peak memory is one of the figures.

    :param case: The case.
    :param say: Told what happens next.
    :return: Its figures; whoever started this process says of which commit.
    :raises ActsparseError: If something that it names cannot be used.
    """
    inputs = find_inputs(case)
    subject = prepare_subject(case, inputs, say)
    if case.backend == "openvino":
        from actsparse.commands.regression.openvino_sides import measure_openvino

        sides = measure_openvino(subject)
    else:
        sides = measure_torch(subject)
    windows = Windows(
        count_words(inputs.evaluation.pages),
        tuple(sides.tokens.tolist()),
        {side: tuple(losses.tolist()) for side, losses in sides.losses.items()},
    )
    return CaseResult(
        case.name,
        inputs.describe(case),
        in_order(loss_figures(windows) | sparsity_figures(sides.sparsity) | _other_figures(sides)),
        {layer.name: layer.sparsity for layer in sides.sparsity.layers},
        windows,
        {
            "calibration_text": inputs.calibration.name,
            "evaluation_text": inputs.evaluation.name,
            "calibration_seconds": sides.calibration_seconds,
            "forward_seconds": sides.forward_seconds,
            **({} if sides.nncf_seconds is None else {"nncf_seconds": sides.nncf_seconds}),
            **sides.details,
        },
        {},
        {**describe_environment(), "machine": describe_machine()},
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def sparsity_figures(report: SparsityReport) -> dict[str, Figure]:
    """
    Work out the figures of measured sparsity.

    :param report: Measured on the evaluation text.
    :return: Figures by name.
    """
    pairs = ((layer.sparsity, layer.target_sparsity) for layer in report.layers)
    farthest = max(abs(sparsity - target) for sparsity, target in pairs if target is not None)
    return {
        "sparsity": Figure(report.sparsity),
        "farthest_layer": Figure(farthest),
        "weight_reads_skipped": Figure(report.weight_reads_skipped),
    }


def _other_figures(sides: Sides) -> dict[str, Figure]:
    values: dict[str, Any] = {
        "calibration_ratio": sides.calibration_seconds / sides.forward_seconds,
        "peak_memory_mb": peak_memory() / 1e6,
        "decode_ratio": sides.decode_ratio,
        "nncf_sparsity": sides.nncf_sparsity,
        "nncf_calibration_ratio": None if sides.nncf_seconds is None else sides.nncf_seconds / sides.forward_seconds,
    }
    return {name: Figure(float(value)) for name, value in values.items() if value is not None}

"""Measure one regression case: its model dense and with masks, on the same windows of text."""

import copy
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from actsparse.backend import backend_of
from actsparse.commands.bench.apart import compile_decoders
from actsparse.commands.bench.decoder import make_core
from actsparse.commands.bench.decoding import CONTEXT_TOKENS, DISCARDED_TOKENS, TIMED_TOKENS
from actsparse.commands.bench.timing import time_decoding
from actsparse.commands.regression.case import Case
from actsparse.commands.regression.figures import DENSE, KINDS, NNCF, SPARSE, CaseResult, Figure, Windows, loss_figures
from actsparse.commands.regression.inputs import find_inputs
from actsparse.commands.regression.nncf_reference import (
    count_nncf_zeros,
    find_layer_names,
    sparsify_with_nncf,
    translate_targets,
)
from actsparse.commands.regression.prepare import CaseModel, prepare_model
from actsparse.errors import ActsparseError
from actsparse.evaluation.sparsity import count_zeros
from actsparse.evaluation.word_perplexity import count_words
from actsparse.openvino.acceleration import accelerate
from actsparse.openvino.build import extension_path
from actsparse.openvino.export import export_model
from actsparse.openvino.folder import MODEL_FILE
from actsparse.runtime.environment import count_cores, describe_environment, describe_machine, peak_memory
from actsparse.runtime.progress import Say
from actsparse.sparsity_report import SparsityReport
from actsparse.storage import assets
from actsparse.texts import Text, token_batches
from actsparse.torch.layers import weight_bytes


@dataclass(frozen=True)
class Measured:
    """
    What is measured of a case before its figures are worked out.

    :param tokens: How many tokens of each window are scored, [windows].
    :param losses: Sums of their negative log-likelihoods in nats: dense, sparse, and NNCF's; [windows].
    """

    tokens: np.ndarray
    losses: dict[str, np.ndarray]
    sparsity: SparsityReport
    forward_seconds: float
    calibration_seconds: float
    others: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def measure_case(case: Case, say: Say) -> CaseResult:
    """
    Measure a case in this process, whose peak memory is one of the figures.

    :return: Its figures; whoever started this process says of which commit.
    :raises ActsparseError: If something that it names cannot be used.
    """
    inputs = find_inputs(case)
    model = prepare_model(case, inputs, say)
    measured = _measure_openvino(model) if case.backend == "openvino" else _measure_torch(model)
    windows = Windows(
        count_words(inputs.evaluation.pages),
        tuple(measured.tokens.tolist()),
        {name: tuple(sums.tolist()) for name, sums in measured.losses.items()},
    )
    figures = loss_figures(windows) | sparsity_figures(measured.sparsity)
    others = measured.others | {
        "calibration_ratio": measured.calibration_seconds / measured.forward_seconds,
        "peak_memory_mb": peak_memory() / 1e6,
    }
    figures |= {name: Figure(float(value)) for name, value in others.items()}
    return CaseResult(
        case.name,
        inputs.describe(case),
        {name: figures[name] for name in KINDS if name in figures},
        {layer.name: layer.sparsity for layer in measured.sparsity.layers},
        windows,
        {
            "calibration_text": inputs.calibration.name,
            "evaluation_text": inputs.evaluation.name,
            "calibration_seconds": measured.calibration_seconds,
            "forward_seconds": measured.forward_seconds,
            **measured.details,
        },
        {},
        {**describe_environment(), "machine": describe_machine()},
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def sparsity_figures(report: SparsityReport) -> dict[str, Figure]:
    """Work out the figures of measured sparsity."""
    pairs = ((layer.sparsity, layer.allocated_sparsity) for layer in report.layers)
    farthest = max(abs(sparsity - allocated) for sparsity, allocated in pairs if allocated is not None)
    return {
        "sparsity": Figure(report.sparsity),
        "farthest_layer": Figure(farthest),
        "weight_reads_skipped": Figure(report.weight_reads_skipped),
    }


def _measure_torch(model: CaseModel) -> Measured:
    """Measure a torch model dense, sparse, and with NNCF's own masks; it comes back masked."""
    model.say("evaluating the dense model")
    tokens, dense = model.score(model.model, "dense")
    losses = {DENSE: dense}
    forward_seconds = model.time_forward()
    others, details = {}, {}
    if model.case.nncf:
        losses[NNCF], others["nncf_sparsity"], details["nncf_seconds"] = _measure_nncf(model)
        others["nncf_calibration_ratio"] = details["nncf_seconds"] / forward_seconds
    calibration_seconds = model.sparsify()
    model.say("evaluating the sparse model")
    with count_zeros(model.model) as counter:
        _, losses[SPARSE] = model.score(counter.model, "sparse")
    return Measured(tokens, losses, counter.report(), forward_seconds, calibration_seconds, others, details)


def _measure_nncf(model: CaseModel) -> tuple[np.ndarray, float, float]:
    """Measure losses and sparsity, by weight bytes, behind NNCF's masks, and the seconds that its call takes."""
    case, example = model.case, model.batches[0]
    model.say("calibrating NNCF's masks")
    layer_names = find_layer_names(model.model, example)
    targets = translate_targets(model.model, example, case.scopes, case.ignored_scope)
    sizes = {node: weight_bytes(model.model.get_submodule(name)) for node, name in layer_names.items()}
    masked = copy.deepcopy(model.model)
    start = time.perf_counter()
    masked = sparsify_with_nncf(masked, model.batches, targets)
    seconds = time.perf_counter() - start
    model.say("evaluating with NNCF's masks")
    with count_nncf_zeros(masked) as shares:
        _, losses = model.score(masked, "NNCF")
    zeros = shares()
    sparsity = np.average(list(zeros.values()), weights=[sizes[node] for node in zeros])
    return losses, float(sparsity), seconds


def _measure_openvino(model: CaseModel) -> Measured:
    """
    Measure the accelerated form of a model, as `deploy_model` makes it; the model comes back masked.

    Sparsity is counted in the portable graph, whose masks can be seen.
    """
    with assets.partial_folder() as folder:
        dense = _convert(model, folder / "dense")
        forward_seconds = model.time_forward()
        calibration_seconds = model.sparsify()
        sparse = _convert(model, folder / "sparse")
        accelerated = sparse.clone()
        acceleration = accelerate(accelerated)
        if not acceleration.masked:
            msg = f"the kernel runs none of the masked layers: {acceleration.kept[0].reason}"
            raise ActsparseError(msg)
        model.say("evaluating the dense and the accelerated model")
        tokens, dense_losses = model.score(dense, "dense")
        _, losses = model.score(accelerated, "accelerated")
        model.say("counting zeros")
        with count_zeros(sparse) as counter:
            model.score(counter.model, "counting zeros")
        others = {}
        if model.case.decode:
            model.say("timing decoding, dense and accelerated turn by turn")
            others["decode_ratio"] = _measure_decode_ratio(model, dense, accelerated, folder)
    operations = Counter(site.operation for site in acceleration.masked for _ in site.layers)
    details = {
        "accelerated_layers": dict(operations),
        "kept_layers": sum(len(site.layers) for site in acceleration.kept),
    }
    both = {DENSE: dense_losses, SPARSE: losses}
    return Measured(tokens, both, counter.report(), forward_seconds, calibration_seconds, others, details)


def _convert(model: CaseModel, folder: Path) -> ov.Model:
    if backend_of(model.model).name == "openvino":
        return model.model.clone()
    model.say("converting the model to OpenVINO")
    export_model(model.model, folder)
    return ov.Core().read_model(folder / MODEL_FILE)


def _measure_decode_ratio(model: CaseModel, dense: ov.Model, sparse: ov.Model, folder: Path) -> float:
    """
    Decode the start of the evaluation text with both, turn by turn, each with the precision hint that is best for it.

    They are saved first, so that they are compiled as a user's would be.
    """
    text = Text("the evaluation text", model.pages)
    length = CONTEXT_TOKENS + DISCARDED_TOKENS + TIMED_TOKENS
    tokens = token_batches(model.tokenizer, text, num_batches=1, length=length)[0]["input_ids"].numpy()
    core = make_core(extension_path())
    paths = {side: folder / f"{side}-timed.xml" for side in (DENSE, SPARSE)}
    for path, timed in zip(paths.values(), (dense, sparse), strict=True):
        ov.save_model(timed, path, compress_to_fp16=False)
    decoders = compile_decoders(core, paths, extension_path(), count_cores(), model.say)
    times = time_decoding(decoders, tokens, num_prompt_tokens=CONTEXT_TOKENS, num_discarded=DISCARDED_TOKENS)
    best = {side: min(float(np.median(found)) for (name, _), found in times.items() if name == side) for side in paths}
    return best[DENSE] / best[SPARSE]

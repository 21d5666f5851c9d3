"""The model of a case, ready to be measured: loaded, its weights compressed, with the windows to calibrate on."""

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from actsparse.backend import backend_of, language_model
from actsparse.calibration import run_each
from actsparse.commands.common import DTYPES
from actsparse.commands.regression.case import Calibration, Case
from actsparse.commands.regression.inputs import Inputs, ModelFiles
from actsparse.errors import DatasetError
from actsparse.evaluation.windows import WindowedText, measure_losses, resolve_max_length
from actsparse.models import load_model
from actsparse.openvino.build import extension_path
from actsparse.openvino.require import require_optimum
from actsparse.openvino.runner import Runner
from actsparse.runtime.progress import Say
from actsparse.scopes import match_targets
from actsparse.sparsify import sparsify_activations
from actsparse.texts import Text, take_batches, token_batches
from actsparse.torch.compression import compress_weights
from actsparse.torch.running import run_batches


@dataclass
class CaseModel:
    """
    The model of a case, and what is needed to mask and score it.

    :param model: The dense model, its weights compressed: a torch module or an `openvino.Model`.
    """

    case: Case
    model: Any
    tokenizer: Any
    batches: list[Any]
    pages: tuple[str, ...]
    max_length: int
    say: Say

    def time_forward(self) -> float:
        """Run the calibration windows through the dense model, after a warm-up."""
        self._run(self.batches[:1])
        start = time.perf_counter()
        self._run(self.batches)
        return time.perf_counter() - start

    def sparsify(self) -> float:
        """
        Mask the model as the case says.

        :raises ActsparseError: If that is not possible.
        """
        case = self.case
        self.say(f"calibrating {case.algorithm} on {case.calibration.batches} x {case.calibration.length} tokens")
        options: dict[str, Any] = {"algorithm": case.algorithm}
        if case.backend == "torch":
            options |= {"tokens": case.tokens, "skip_first": case.skip_first}
        start = time.perf_counter()
        self.model = sparsify_activations(self.model, self.batches, case.scopes, case.ignored_scope, **options)
        return time.perf_counter() - start

    def score(self, model: Any, description: str) -> tuple[np.ndarray, np.ndarray]:
        """
        Score the evaluation text.

        :return: How many tokens of each window are scored, and the sum of their negative log-likelihoods in nats,
            [windows].
        """
        model = language_model(model)
        text = WindowedText.of(model, self.tokenizer, self.pages, self.max_length)
        return text.num_scored, measure_losses(model, text, description=description, is_finite=True)

    def _run(self, batches: list[Any]) -> None:
        shown: dict[str, Any] = {"total": len(batches), "description": "forward passes"}
        if backend_of(self.model).name == "torch":
            run_batches(self.model, batches, **shown)
        else:
            run_each(Runner(self.model).run, batches, **shown)


def prepare_model(case: Case, inputs: Inputs, say: Say) -> CaseModel:
    """
    Load a case's model and cut its calibration text.

    :raises ActsparseError: If something does not fit, or a tool that the case takes is missing.
    """
    if case.backend == "openvino":
        require_optimum("backend: openvino")
        # Without it, a case would quietly be another one.
        extension_path()
    say(f"loading {case.model}")
    model, tokenizer, config = _load(case, inputs.model)
    max_length = resolve_max_length(SimpleNamespace(config=config), tokenizer, case.evaluation.max_length)
    batches = calibration_windows(tokenizer, inputs.calibration, case.calibration, case.seed)
    _require_match(case, model, batches[0])
    if case.weights is not None:
        say(f"compressing the weights to {case.weights.upper()}")
        model = compress_weights(model, case.weights, batches[0], group_size=case.group_size)
    return CaseModel(case, model, tokenizer, batches, inputs.evaluation.pages, max_length, say)


def calibration_windows(tokenizer: Any, text: Text, size: Calibration, seed: int) -> list[dict[str, torch.Tensor]]:
    """
    Take windows of a text to calibrate with; equal arguments give equal windows.

    :param seed: 0 takes the first ones, as `token_batches`; another number chooses at random among all of the text.
    :raises DatasetError: If the text is too short.
    """
    num_batches, length = size.batches, size.length
    if seed == 0:
        return token_batches(tokenizer, text, num_batches=num_batches, length=length)
    # A window has a token at least, and a token a byte: more there cannot be.
    most = sum(len(page.encode()) + 2 for page in text.pages)
    windows = take_batches(tokenizer, text, most=most, length=length)
    if len(windows) < num_batches:
        msg = f"{text.name} is too short: it makes {len(windows)} windows of {length} tokens, not {num_batches}"
        raise DatasetError(msg)
    chosen = np.random.default_rng(seed).choice(len(windows), num_batches, replace=False)
    return [windows[number] for number in sorted(chosen)]


def _require_match(case: Case, model: Any, example: Any) -> None:
    """Find a scope that matches nothing before anything long is done."""
    backend = backend_of(model)
    if case.targets and backend.name == "torch":
        with backend.editing():
            match_targets(case.scopes, case.ignored_scope, backend.layers(example))
        backend.replace_masks({})


def _load(case: Case, files: ModelFiles) -> tuple[Any, Any, Any]:
    loaded = load_model(files.name, dtype=DTYPES[case.dtype])
    model = loaded.model.model if files.is_openvino else loaded.model
    return model, loaded.tokenizer, loaded.model.config

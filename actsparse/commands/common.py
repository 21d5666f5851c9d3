"""What several commands share: their constants, how they read options, load a model and its batches, and report."""

import hashlib
import json
import math
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from actsparse.console.plot import plot_sparsity_by_layer
from actsparse.console.report import Report, write_json
from actsparse.errors import ActsparseError, ScopeError, nearest
from actsparse.models import LoadedModel, load_model
from actsparse.recovery import Recovery, recover
from actsparse.runtime.progress import Say
from actsparse.scopes.target_scope import TargetScope
from actsparse.storage.files import write_bytes
from actsparse.texts import Text, take_batches, token_batches
from actsparse.torch.compression import INT8_MODES, compress_int8
from actsparse.torch.offload import parse_memory

CALIBRATION_LENGTH = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THRESHOLDS_NAME = "thresholds.safetensors"
# Windows that make a step of recovery at once, and how many such batches are held out.
RECOVERY_BATCH = 4
RECOVERY_HELD_OUT = 3


def require_choice(option: str, value: Any, choices: Iterable[str]) -> None:
    """
    Check what an option says.

    :raises ActsparseError: If that is not among them.
    """
    if value not in choices:
        msg = f"{option} is {value!r}; it is one of {', '.join(choices)} (nearest: {nearest(str(value), choices, 1)})"
        raise ActsparseError(msg)


def validate_precision(int8: Any, dtype: str) -> None:
    """
    Check what weights shall be.

    :param int8: What `--int8` says.
    :param dtype: What `--dtype` says.
    :raises ActsparseError: If one of them is not a choice.
    """
    require_choice("--dtype", dtype, DTYPES)
    if int8 is not None:
        require_choice("--int8", int8, INT8_MODES)


def name_weights(int8: str | None, dtype: str) -> str:
    """
    Say what weights are.

    :param int8: What `--int8` says.
    :param dtype: What `--dtype` says.
    """
    return f"INT8_{int8.upper()}" if int8 else dtype


def parse_targets(targets: tuple[str, ...], roles: tuple[str, ...], sparsity: float | None) -> Any:
    """
    Turn the command line's targets into what `sparsify_activations` takes.

    :raises ScopeError: If none or both forms are given, or a text has another form.
    """
    if (sparsity is None) == (not targets and not roles):
        msg = "give either --sparsity S, or one or more of --target 'PATTERN=S' and --role ROLE=S"
        raise ScopeError(msg)
    if sparsity is not None:
        return sparsity
    scopes: dict[TargetScope, float] = {}
    for option, texts in (("--target", targets), ("--role", roles)):
        for text in texts:
            name, separator, number = text.rpartition("=")
            value = _to_number(number)
            if not separator or not name or value is None:
                msg = f"{option} takes {'PATTERN' if option == '--target' else 'ROLE'}=S such as x=0.3, not {text!r}"
                raise ScopeError(msg)
            scope = TargetScope(patterns=[name]) if option == "--target" else TargetScope(roles=(name,))
            if scope in scopes:
                msg = f"{option} {name!r} is given twice"
                raise ScopeError(msg)
            scopes[scope] = value
    return scopes


def _to_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def point_key(*dependencies: Any) -> str:
    """
    Name what was measured after all that it depends on, so that it is reused for nothing else.

    :param dependencies: What can be written as JSON; the version of actsparse is added.
    """
    described = json.dumps([version("actsparse"), *dependencies], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:12]


def load_for_job(name: str, job: Any) -> LoadedModel:
    """
    Load a torch model of the type and in the place that a job says.

    :param job: What to do; its `dtype`, `tokenizer`, `device` and `max_memory` count.
    :raises ActsparseError: If it cannot be loaded so.
    """
    max_memory = None if job.max_memory is None else parse_memory(job.max_memory)
    placement = {"device": job.device, "max_memory": max_memory}
    return load_model(name, dtype=DTYPES[job.dtype], torch_only=True, tokenizer=job.tokenizer, **placement)


def read_batches(loaded: LoadedModel, calibration: Text, num_batches: int) -> list[dict[str, torch.Tensor]]:
    """
    Make a model's calibration batches.

    :param num_batches: How many batches of `CALIBRATION_LENGTH` tokens.
    :raises ActsparseError: If the text is too short.
    """
    batches = token_batches(loaded.tokenizer, calibration, num_batches=num_batches, length=CALIBRATION_LENGTH)
    return move_batches(batches, loaded.model)


def move_batches(batches: list[dict[str, torch.Tensor]], model: Any) -> list[dict[str, torch.Tensor]]:
    """Move model inputs to a model that is as a whole on an accelerator; hooks move them for any other."""
    device = next(model.parameters()).device
    if device.type in ("cpu", "meta"):
        return batches
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def recover_on_text(
    model: Any, tokenizer: Any, text: Text, *, steps: int, train: str, checkpoint: Path | None = None
) -> Recovery:
    """
    Train a masked model on a text, whose end is held out.

    :param train: See `recover`, as for the rest.
    :raises ActsparseError: If the text is too short, or as `recover`.
    """
    most, length = steps + RECOVERY_HELD_OUT, CALIBRATION_LENGTH
    batches = take_batches(tokenizer, text, most=most, length=length, batch_size=RECOVERY_BATCH)
    if len(batches) < 2:
        batches = take_batches(tokenizer, text, most=most, length=length)
    held_out = min(RECOVERY_HELD_OUT, len(batches) // 2)
    if held_out == 0:
        msg = f"{text.name} is too short to recover with"
        raise ActsparseError(msg)
    rest = {"steps": steps, "batches_per_step": 1, "checkpoint": checkpoint, "train": train}
    return recover(model, batches[:-held_out], held_out=batches[-held_out:], **rest)


def compress(model: Any, int8: str | None, example: Any, say: Say) -> Any:
    """
    Compress a model's weights, where that is asked for.

    :param int8: What `--int8` says.
    """
    if int8 is None:
        return model
    say(f"compressing the weights to {name_weights(int8, '')}")
    return compress_int8(model, int8, example)


def write_report(report: Report, out: Path, contents: dict[str, Any], more: str = "") -> None:
    """
    Write a report's JSON, Markdown and plot.

    :param contents: What the JSON shall hold: the report's own figures, with more where there is more.
    :raises OutputError: If one of the files cannot be written.
    """
    write_json(out / "report.json", contents)
    write_bytes(out / "report.md", (report.to_markdown() + (f"\n{more}" if more else "")).encode())
    reports = {row.name: row.cost.sparsity for row in report.rows if row.cost.sparsity is not None}
    plot_sparsity_by_layer(reports, out / "sparsity_by_layer.png")

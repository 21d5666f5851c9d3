"""The jobs behind `actsparse sparsify` and `actsparse evaluate`."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from actsparse.algorithms import get_algorithm
from actsparse.backend import backend_of
from actsparse.budget import BudgetResult, sparsify_to_perplexity
from actsparse.calibration import Calibration, Settings
from actsparse.commands.demo import CALIBRATION_LENGTH, write_report
from actsparse.console.gate import judge, require_limit
from actsparse.console.plot import plot_sparsity_by_layer
from actsparse.console.report import (
    Report,
    Row,
    acceleration_table,
    read_json,
    selection_table,
    sparsity_table,
    write_json,
)
from actsparse.errors import ActsparseError, ScopeError, SourceError, nearest
from actsparse.evaluation.cost import Cost, evaluate_cost
from actsparse.evaluation.sparsity import measure_sparsity
from actsparse.models import LoadedModel, load_model
from actsparse.models.explain import explain_errors
from actsparse.models.save import save_folder
from actsparse.openvino.folder import MODEL_FILE
from actsparse.openvino.require import require_optimum
from actsparse.recovery import Recovery, recover
from actsparse.runtime.distributed import count_processes, digest_of, is_first, wait_for_all
from actsparse.runtime.environment import describe_environment, library_versions, peak_memory
from actsparse.scopes.matching import validate_targets
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsify import calibrate
from actsparse.storage.disk_cache import DiskCache
from actsparse.storage.files import kind_of, prepare_folder
from actsparse.texts import Text, describe_batches, load_pages, take_batches, token_batches
from actsparse.thresholds import fingerprint, load_thresholds, read_thresholds, save_thresholds
from actsparse.torch.compression import INT8_MODES, compress_int8
from actsparse.torch.insertion import CHILD, named_sparsifiers, suspend_sparsifiers
from actsparse.torch.offload import every_weight, parse_memory, require_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
THRESHOLDS_NAME = "thresholds.safetensors"
# Enough to see whether the targets are met; the evaluation text is where sparsity is measured properly.
MEASURED_BATCHES = 8
CHECKPOINT_NAME = "recovery.checkpoint"
UNFINISHED_NAME = "calibration.unfinished"
# Windows that make a step at once, and how many such batches are held out.
RECOVERY_BATCH = 4
RECOVERY_HELD_OUT = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class SparsifyJob:
    """What `actsparse sparsify` is asked to do; see its help."""

    model: str
    out: Path
    targets: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    sparsity: float | None = None
    ignored: tuple[str, ...] = ()
    algorithm: str = "magnitude"
    int8: str | None = None
    accelerate: bool = False
    exact: bool = False
    calibration: str = "default"
    num_batches: int = 32
    skip_first: int = 0
    max_perplexity_increase: float | None = None
    held_out: str = "default"
    recover: int = 0
    training: str = "default"
    text: str | None = None
    num_pages: int | None = None
    max_length: int | None = None
    fail_above: float | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        get_algorithm(self.algorithm)
        validate_precision(self.int8, self.dtype)
        if self.max_perplexity_increase is not None and (self.targets or self.roles or self.sparsity is not None):
            msg = "--max-perplexity-increase finds the sparsity of all block layers itself: leave other targets out"
            raise ScopeError(msg)
        if self.recover < 0:
            msg = f"--recover takes a number of steps, not {self.recover}"
            raise ActsparseError(msg)
        if self.recover and count_processes() > 1:
            msg = "--recover trains in one process: calibrate with several first, or run it without a launcher"
            raise ActsparseError(msg)
        if self.fail_above is not None:
            self._validate_gate(self.fail_above)
        if self.exact and not self.accelerate:
            msg = "--exact is about the accelerated model: give --accelerate too"
            raise ActsparseError(msg)
        if self.accelerate and self.skip_first:
            msg = "--skip-first is for torch alone: masks of an OpenVINO model cannot do that; leave --accelerate out"
            raise ActsparseError(msg)
        if self.accelerate:
            require_optimum("--accelerate")

    def _validate_gate(self, limit: float) -> None:
        require_limit("--fail-above", limit)
        if self.text is None:
            msg = "--fail-above is about perplexity on an evaluation text: give --text SOURCE too"
            raise ActsparseError(msg)
        if self.recover:
            msg = (
                "--recover saves the weights that it trains: recover first, then sparsify that folder with --fail-above"
            )
            raise ActsparseError(msg)

    @property
    def ignored_scope(self) -> TargetScope | None:
        """The layers to leave out."""
        return TargetScope(patterns=list(self.ignored)) if self.ignored else None


@dataclass(frozen=True)
class EvaluateJob:
    """What `actsparse evaluate` is asked to do; see its help."""

    model: str
    text: str = "default"
    num_pages: int | None = None
    max_length: int | None = None
    thresholds: Path | None = None
    int8: str | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        validate_precision(self.int8, self.dtype)


def run_sparsify(job: SparsifyJob, say: Say) -> tuple[dict[str, Any], list[Table]]:
    """
    Calibrate thresholds and write them with a report.

    Where masks cost more than `fail_above` allows, the report is all that is written, and an earlier run's thresholds
    and OpenVINO model are removed from the folder.

    :param job: What to do.
    :param say: Told what happens next.
    :return: Every figure, and tables to print.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    is_search = job.max_perplexity_increase is not None
    targets: Any = None if is_search else parse_targets(job.targets, job.roles, job.sparsity)
    if not is_search:
        validate_targets(targets, job.ignored_scope)
    calibration = load_pages(job.calibration, purpose="calibration")
    training = load_pages(job.training, purpose="training") if job.recover else None
    held_out = load_pages(job.held_out) if is_search else None
    text = load_pages(job.text, num_pages=job.num_pages) if job.text is not None else None
    prepare_folder(job.out)
    say(f"loading {job.model}")
    loaded = load_for_job(job.model, job)
    # Before hours are spent on calibration.
    for option in ("recover", "accelerate"):
        if getattr(job, option):
            require_weights(loaded.model, f"--{option}")
    batches = token_batches(loaded.tokenizer, calibration, num_batches=job.num_batches, length=CALIBRATION_LENGTH)
    batches = move_batches(batches, loaded.model)
    # Compressed weights cannot be trained.
    model = loaded.model if training else _compress(loaded.model, job, batches, say)
    result: dict[str, Any] = {}
    tables: list[Table] = []
    kept = DiskCache(job.out / UNFINISHED_NAME, _name_calibration(job, model, batches))
    start = time.perf_counter()
    took: Calibration | None = None
    if held_out is not None:
        found = _search(model, loaded.tokenizer, job, batches, held_out, say)
        result["budget"] = found.to_dict()
        tables.append(found.to_table(held_out.name))
    else:
        how = Settings(get_algorithm(job.algorithm), skip_first=job.skip_first, cache=kept)
        took = calibrate(model, batches, targets, job.ignored_scope, how)
        result["calibration"] = took.to_dict()
        if took.selection is not None:
            tables.append(selection_table(took.selection))
    seconds = time.perf_counter() - start
    if training is not None:
        recovery = _recover(model, loaded.tokenizer, job, training, say)
        result["recovery"] = recovery.to_dict()
        tables.append(recovery.to_table())
        model = _compress(model, job, batches, say)
    settings = {
        "model": job.model,
        "weights": f"INT8_{job.int8.upper()}" if job.int8 else job.dtype,
        "calibration text": f"{calibration.name}: {describe_batches(loaded.tokenizer, batches)}",
        "algorithm": job.algorithm if took is None else took.name_algorithm(job.algorithm),
        "tokens masked": f"all but the first {job.skip_first}" if job.skip_first else "all",
    }
    if training is not None:
        settings["recovered on"] = f"{training.name}: {result['recovery']['best_step']} steps"
    measured = measure_sparsity(model, batches[:MEASURED_BATCHES])
    title = f"Sparsity on {min(job.num_batches, MEASURED_BATCHES)} calibration batches"
    title += f", calibrated in {seconds:.1f} s, peak memory {peak_memory() / 1e6:.0f} MB"
    tables.append(sparsity_table(measured, title))
    result |= {
        "settings": settings,
        "calibration_seconds": round(seconds, 2),
        "processes": count_processes(),
        "peak_memory": peak_memory(),
        "calibration_sparsity": measured.to_dict(),
        "environment": describe_environment(),
    }
    report = None
    if text is not None:
        report = _report_cost(model, loaded.tokenizer, job, text, settings, seconds, say)
        result |= report.to_dict()
        if job.fail_above is not None:
            dense, sparse = report.rows
            verdict = judge(job.fail_above, dense, sparse, text.name)
            result["gate"] = verdict.to_dict()
            if not verdict.has_passed:
                _withdraw(job.out)
                kept.forget()
                write_report(report, job.out, result)
                return result, [*tables, report.to_table()]
    source = str(job.out.resolve()) if training is not None else _absolute(job.model)
    notes = {"source": source, "int8": job.int8, "calibration": settings["calibration text"]}
    # Whoever finds an OpenVINO model takes it: at no moment may one with other masks lie beside new thresholds.
    if not job.accelerate:
        _withdraw_model(job.out)
    elif is_first():
        acceleration = _deploy(model, loaded.tokenizer, job, say)
        result["acceleration"] = asdict(acceleration)
        tables.append(acceleration_table(acceleration))
    save_thresholds(model, job.out / THRESHOLDS_NAME, **notes, measured_sparsity=measured.sparsity)
    # Only now: after a conversion that failed, or a full disk, the next run need not calibrate again.
    kept.forget()
    wait_for_all()
    if report is None:
        write_json(job.out / "report.json", result)
        plot_sparsity_by_layer({"calibration batches": measured}, job.out / "sparsity_by_layer.png")
        return result, tables
    write_report(report, job.out, result)
    return result, [*tables, report.to_table()]


def _withdraw(out: Path) -> None:
    """Remove the thresholds and the OpenVINO model that an earlier run has left for others to use."""
    if is_first():
        (out / THRESHOLDS_NAME).unlink(missing_ok=True)
    _withdraw_model(out)


def _withdraw_model(out: Path) -> None:
    """Remove an earlier run's OpenVINO model, if its report says that it is one: its masks are others."""
    earlier = read_json(out / "report.json") if is_first() else None
    if isinstance(earlier, dict) and "acceleration" in earlier:
        for file in (Path(MODEL_FILE), Path(MODEL_FILE).with_suffix(".bin")):
            (out / file).unlink(missing_ok=True)


def _compress(model: Any, job: SparsifyJob, batches: list[Any], say: Say) -> Any:
    if job.int8 is None:
        return model
    say(f"compressing the weights to INT8_{job.int8.upper()}")
    return compress_int8(model, job.int8, batches[0])


def load_for_job(name: str, job: Any) -> LoadedModel:
    """
    Load a model of the type and in the place that a job says.

    :param name: The model.
    :param job: What to do; its `dtype`, `device` and `max_memory` count.
    :return: The model.
    :raises ActsparseError: If it cannot be loaded so.
    """
    max_memory = None if job.max_memory is None else parse_memory(job.max_memory)
    return load_model(name, dtype=DTYPES[job.dtype], device=job.device, max_memory=max_memory)


def move_batches(batches: list[dict[str, torch.Tensor]], model: Any) -> list[dict[str, torch.Tensor]]:
    """
    Move model inputs to a model that is as a whole on an accelerator; hooks move them for any other.

    :param batches: Model inputs.
    :param model: The model.
    :return: The inputs there.
    """
    device = next(model.parameters()).device
    if device.type in ("cpu", "meta"):
        return batches
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def _name_calibration(job: SparsifyJob, model: Any, batches: list[Any]) -> str:
    """Identify model, data and settings, so that what was measured for others is not taken for this calibration's."""
    wanted = [job.targets, job.roles, job.sparsity, job.ignored, job.algorithm, job.skip_first, job.dtype, job.int8]
    # Shapes alone do not tell two trainings of one model apart; some of each parameter's entries do. Copied, because a
    # view would hold all of a weight that was read from disk.
    weights = [weight.flatten()[:: max(1, weight.numel() // 64)].clone() for weight in every_weight(model)]
    return digest_of([fingerprint(model), repr(wanted), json.dumps(library_versions()), weights, batches]).hex()


def _search(model: Any, tokenizer: Any, job: SparsifyJob, batches: list[Any], held_out: Text, say: Say) -> BudgetResult:
    limit = job.max_perplexity_increase
    say(f"looking for the sparsity that costs {100 * (limit or 0):g}% of perplexity on {held_out.name}")
    found = sparsify_to_perplexity(
        model,
        tokenizer,
        batches,
        held_out.pages,
        max_perplexity_increase=limit,  # type: ignore[arg-type]
        algorithm=job.algorithm,
        ignored_scope=job.ignored_scope,
        skip_first=job.skip_first,
        say=say,
    )
    if found.best is None:
        msg = f"no sparsity was found that costs {100 * (limit or 0):g}% of perplexity or less: nothing was written"
        raise ActsparseError(msg)
    return found


def _recover(model: Any, tokenizer: Any, job: SparsifyJob, training: Text, say: Say) -> Recovery:
    say(f"recovering on {training.name}")
    most, length = job.recover + RECOVERY_HELD_OUT, CALIBRATION_LENGTH
    train = take_batches(tokenizer, training, most=most, length=length, batch_size=RECOVERY_BATCH)
    if len(train) < 2:
        train = take_batches(tokenizer, training, most=most, length=length)
    held_out = min(RECOVERY_HELD_OUT, len(train) // 2)
    if held_out == 0:
        msg = f"{training.name} is too short to recover with"
        raise ActsparseError(msg)
    done = recover(
        model,
        train[:-held_out],
        held_out=train[-held_out:],
        steps=job.recover,
        batches_per_step=1,
        checkpoint=job.out / CHECKPOINT_NAME,
    )
    # The masks have a file of their own.
    weights = {name: tensor for name, tensor in model.state_dict().items() if f".{CHILD}." not in name}
    # An earlier run's thresholds would fit these weights by shape alone.
    save_folder(model, tokenizer, job.out, weights=weights, outdated=[THRESHOLDS_NAME])
    (job.out / CHECKPOINT_NAME).unlink(missing_ok=True)
    return done


def _report_cost(
    model: Any, tokenizer: Any, job: SparsifyJob, text: Text, settings: dict[str, str], seconds: float, say: Say
) -> Report:
    say(f"evaluating on {text.name}")
    with suspend_sparsifiers(s for _, s in named_sparsifiers(model)):
        dense = evaluate_cost(model, tokenizer, text.pages, max_length=job.max_length)
    sparse = evaluate_cost(model, tokenizer, text.pages, max_length=job.max_length)
    rows = (Row("dense" if not job.recover else "recovered, without masks", dense), Row("sparse", sparse, seconds))
    return Report(f"What the masks of {job.model} cost", rows, {**settings, "evaluation text": text.name})


def run_evaluate(job: EvaluateJob, say: Say) -> tuple[dict[str, Any], list[Table]]:
    """
    Measure word perplexity and sparsity.

    :param job: What to do.
    :param say: Told what happens next.
    :return: Every figure, and tables to print.
    :raises ActsparseError: If an input cannot be used.
    """
    text = load_pages(job.text, num_pages=job.num_pages)
    loaded, int8 = load_for_evaluation(job, say)
    say(f"evaluating on {text.name}")
    cost = evaluate_cost(loaded.model, loaded.tokenizer, text.pages, max_length=job.max_length)
    is_openvino = backend_of(loaded.model).name == "openvino"
    settings = {
        "model": job.model,
        "weights": "as the OpenVINO model has them" if is_openvino else f"INT8_{int8.upper()}" if int8 else job.dtype,
        "evaluation text": f"{text.name}: {cost.perplexity.num_words} words, {cost.perplexity.num_tokens} tokens, "
        f"windows of {cost.perplexity.max_length}",
    }
    if cost.sparsity is not None:
        settings["tokens masked"] = cost.sparsity.tokens
    report = Report("Word perplexity", (Row(_row_name(loaded.model, cost), cost),), settings)
    tables = [report.to_table()]
    if cost.sparsity is not None:
        tables.append(sparsity_table(cost.sparsity, "Sparsity on the evaluation text"))
    return report.to_dict(), tables


def parse_targets(targets: tuple[str, ...], roles: tuple[str, ...], sparsity: float | None) -> Any:
    """
    Turn the command line's targets into what `sparsify_activations` takes.

    :param targets: Texts of the form PATTERN=S.
    :param roles: Texts of the form ROLE=S.
    :param sparsity: One sparsity for all block layers.
    :return: Scopes with their targets, or the one sparsity.
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


def _deploy(model: Any, tokenizer: Any, job: SparsifyJob, say: Say) -> Any:
    from actsparse.openvino import deploy_model

    say("converting the model to OpenVINO and accelerating it")
    return deploy_model(model, job.out, tokenizer, exact=job.exact)


def load_for_evaluation(job: EvaluateJob, say: Say) -> tuple[LoadedModel, str | None]:
    """
    Load a model with the masks of a thresholds file, or of the folder that it is in.

    :param job: Which model, thresholds file and weights.
    :param say: Told what happens next.
    :return: The model, and how its weights are compressed to INT8.
    :raises ActsparseError: If one of them cannot be used.
    """
    name, thresholds, int8 = job.model, job.thresholds, job.int8
    if kind_of(Path(name) / MODEL_FILE) == "file":
        return _load_openvino(job, say), None
    folder_file = Path(name) / THRESHOLDS_NAME
    if thresholds is None and kind_of(folder_file) == "file":
        thresholds = folder_file
        notes = read_thresholds(thresholds).notes
        int8 = int8 or notes.get("int8")
        if kind_of(Path(name) / "config.json") != "file":
            name = notes.get("source")
            if not isinstance(name, str):
                msg = f"{folder_file} does not say which model it belongs to; give the model and --thresholds"
                raise SourceError(msg)
        validate_precision(int8, job.dtype)
    elif thresholds is not None:
        read_thresholds(thresholds)
    say(f"loading {name}")
    loaded = load_for_job(name, job)
    model = loaded.model
    if int8 is not None:
        say(f"compressing the weights to INT8_{int8.upper()}")
        example = loaded.tokenizer("An example input.", return_tensors="pt")
        model = compress_int8(model, int8, {"input_ids": example["input_ids"]})
    if thresholds is not None:
        load_thresholds(model, thresholds)
    return LoadedModel(model, loaded.tokenizer, name), int8  # type: ignore[arg-type]


def _load_openvino(job: EvaluateJob, say: Say) -> LoadedModel:
    from transformers import AutoTokenizer

    from actsparse.openvino import load_causal_lm

    if job.thresholds is not None or job.int8 is not None:
        msg = (
            f"{job.model} holds an OpenVINO model, whose weights and masks are fixed: leave --thresholds and --int8 out"
        )
        raise ActsparseError(msg)
    say(f"loading {job.model}")
    model = load_causal_lm(job.model, compile=False)
    with explain_errors(job.model):
        tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True, trust_remote_code=False)
    return LoadedModel(model, tokenizer, job.model)


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


def require_choice(option: str, value: Any, choices: Any) -> None:
    """
    Check what an option says.

    :param option: Its name.
    :param value: What it says.
    :param choices: What it may say.
    :raises ActsparseError: If that is not among them.
    """
    if value not in choices:
        msg = f"{option} is {value!r}; it is one of {', '.join(choices)} (nearest: {nearest(str(value), choices, 1)})"
        raise ActsparseError(msg)


def _to_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _row_name(model: Any, cost: Cost) -> str:
    if cost.sparsity is not None:
        return "sparse"
    if backend_of(model).name == "torch":
        return "dense"
    from actsparse.openvino.acceleration import is_accelerated

    return "accelerated" if is_accelerated(model.model) else "dense"


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name

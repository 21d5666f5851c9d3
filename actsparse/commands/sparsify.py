"""`actsparse sparsify`: load, calibrate, recover, compress, judge, publish."""

import json
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from actsparse.algorithms import get_algorithm, get_allocating_algorithm
from actsparse.budget import sparsify_to_perplexity
from actsparse.calibration import Settings
from actsparse.commands.common import (
    THRESHOLDS_NAME,
    compress,
    load_for_job,
    name_weights,
    parse_targets,
    read_batches,
    recover_on_text,
    require_choice,
    validate_precision,
    write_report,
)
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
from actsparse.errors import ActsparseError, ScopeError
from actsparse.evaluation.cost import evaluate_cost
from actsparse.evaluation.sparsity import measure_sparsity
from actsparse.models.save import save_folder
from actsparse.openvino.folder import MODEL_FILE
from actsparse.openvino.require import require_optimum
from actsparse.recovery import TRAINED
from actsparse.runtime.distributed import count_processes, digest_of, is_first, wait_for_all
from actsparse.runtime.environment import describe_environment, library_versions, peak_memory
from actsparse.runtime.progress import Say
from actsparse.scopes.matching import validate_targets
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsify import calibrate
from actsparse.storage.disk_cache import DiskCache
from actsparse.storage.files import prepare_folder
from actsparse.texts import describe_batches, load_pages
from actsparse.thresholds import fingerprint, save_thresholds
from actsparse.torch.insertion import CHILD, named_sparsifiers, suspend_sparsifiers
from actsparse.torch.offload import every_weight, require_weights

# Enough to see whether the targets are met; the evaluation text is where sparsity is measured properly.
MEASURED_BATCHES = 8
CHECKPOINT_NAME = "recovery.checkpoint"
UNFINISHED_NAME = "calibration.unfinished"
# The options that no measurement depends on: where results go, what comes after calibration, and how many weights are
# in memory at once. A calibration is known again by all others, those included that are still to come.
NEVER_MEASURED_WITH = frozenset(
    ("out", "accelerate", "exact", "training", "text", "num_pages", "max_length", "fail_above", "max_memory")
)


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
    train: str = "weights"
    training: str = "default"
    text: str | None = None
    num_pages: int | None = None
    max_length: int | None = None
    fail_above: float | None = None
    dtype: str = "fp32"
    tokenizer: str | None = None
    device: str = "cpu"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        get_algorithm(self.algorithm)
        validate_precision(self.int8, self.dtype)
        if self.max_perplexity_increase is not None and (self.targets or self.roles or self.sparsity is not None):
            msg = "--max-perplexity-increase finds the sparsity of all block layers itself: leave other targets out"
            raise ScopeError(msg)
        if self.max_perplexity_increase is not None:
            get_allocating_algorithm(self.algorithm)
        if self.recover < 0:
            msg = f"--recover takes a number of steps, not {self.recover}"
            raise ActsparseError(msg)
        require_choice("--train", self.train, TRAINED)
        if self.train == "bias" and not self.recover:
            msg = "--train says what --recover trains: give --recover STEPS too"
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
        if self.trains_weights:
            msg = (
                "--recover saves the weights that it trains: recover first, then sparsify that folder with --fail-above"
            )
            raise ActsparseError(msg)

    @property
    def trains_weights(self) -> bool:
        """Whether the model's weights change."""
        return bool(self.recover) and self.train == "weights"

    def parse_targets(self) -> Any:
        """
        Turn the options into what `sparsify_activations` takes.

        :raises ScopeError: If they cannot be understood.
        """
        has_targets = self.targets or self.roles or self.sparsity is not None
        if not get_algorithm(self.algorithm).needs_data and not has_targets:
            return 1.0
        return parse_targets(self.targets, self.roles, self.sparsity)

    @property
    def ignored_scope(self) -> TargetScope | None:
        """The layers to leave out."""
        return TargetScope(patterns=list(self.ignored)) if self.ignored else None


def run_sparsify(job: SparsifyJob, say: Say) -> tuple[dict[str, Any], list[Table]]:
    """
    Calibrate thresholds and write them with a report.

    Where masks cost more than `fail_above` allows, the report is all that is written, and an earlier run's thresholds
    and OpenVINO model are removed from the folder.

    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    run = _Run(job, say)
    # Compressed weights cannot be trained.
    if not job.trains_weights:
        run.compress()
    run.calibrate()
    if job.recover:
        run.recover()
    if job.trains_weights:
        run.compress()
    run.measure()
    if run.judge():
        run.publish()
    else:
        run.withdraw()
    run.report()
    return run.figures, run.tables


class _Run:
    """A job under way: its model, as far as that has come, and what has been found."""

    def __init__(self, job: SparsifyJob, say: Say) -> None:
        self.figures: dict[str, Any] = {}
        self.tables: list[Table] = []
        self._job, self._say = job, say
        is_search = job.max_perplexity_increase is not None
        self._targets: Any = None if is_search else job.parse_targets()
        if not is_search:
            validate_targets(self._targets, job.ignored_scope)
        calibration = load_pages(job.calibration, purpose="calibration")
        self._training = load_pages(job.training, purpose="training") if job.recover else None
        self._held_out = load_pages(job.held_out) if is_search else None
        self._text = load_pages(job.text, num_pages=job.num_pages) if job.text is not None else None
        prepare_folder(job.out)
        say(f"loading {job.model}")
        loaded = load_for_job(job.model, job)
        # Before hours are spent on calibration.
        for option in ("recover", "accelerate"):
            if getattr(job, option):
                require_weights(loaded.model, f"--{option}")
        if job.accelerate:
            from actsparse.openvino.export import require_exportable

            require_exportable(loaded.model)
        self._batches = read_batches(loaded, calibration, job.num_batches)
        self._model: Any = loaded.model
        self._tokenizer = loaded.tokenizer
        self._settings = {
            "model": job.model,
            "weights": name_weights(job.int8, job.dtype),
            "calibration text": f"{calibration.name}: {describe_batches(loaded.tokenizer, self._batches)}",
            "algorithm": job.algorithm,
            "tokens masked": f"all but the first {job.skip_first}" if job.skip_first else "all",
        }

    def compress(self) -> None:
        self._model = compress(self._model, self._job.int8, self._batches[0], self._say)

    def calibrate(self) -> None:
        job = self._job
        name = partial(name_calibration, job, self._model, self._batches)
        self._kept = DiskCache(job.out / UNFINISHED_NAME, name)
        start = time.perf_counter()
        if job.max_perplexity_increase is not None:
            self._search(job.max_perplexity_increase)
        else:
            how = Settings(get_algorithm(job.algorithm), skip_first=job.skip_first, cache=self._kept)
            took = calibrate(self._model, self._batches, self._targets, job.ignored_scope, how)
            self._settings["algorithm"] = took.name_algorithm(job.algorithm)
            self.figures["calibration"] = took.to_dict()
            if took.selection is not None:
                self.tables.append(selection_table(took.selection))
        self._seconds = time.perf_counter() - start

    def _search(self, limit: float) -> None:
        job, held_out = self._job, self._held_out
        assert held_out is not None
        self._say(f"looking for the sparsity that costs {100 * limit:g}% of perplexity on {held_out.name}")
        found = sparsify_to_perplexity(
            self._model,
            self._tokenizer,
            self._batches,
            held_out.pages,
            max_perplexity_increase=limit,
            algorithm=job.algorithm,
            ignored_scope=job.ignored_scope,
            skip_first=job.skip_first,
            say=self._say,
        )
        if found.best is None:
            msg = f"no sparsity was found that costs {100 * limit:g}% of perplexity or less: nothing was written"
            raise ActsparseError(msg)
        self.figures["budget"] = found.to_dict()
        self.tables.append(found.to_table(held_out.name))

    def recover(self) -> None:
        job, training, tokenizer = self._job, self._training, self._tokenizer
        assert training is not None
        self._say(f"recovering on {training.name}")
        checkpoint = job.out / CHECKPOINT_NAME
        how = {"steps": job.recover, "train": job.train, "checkpoint": checkpoint}
        done = recover_on_text(self._model, tokenizer, training, **how)
        if job.trains_weights:
            # The masks have a file of their own.
            weights = {name: tensor for name, tensor in self._model.state_dict().items() if f".{CHILD}." not in name}
            # An earlier run's thresholds would fit these weights by shape alone.
            save_folder(self._model, tokenizer, job.out, weights=weights, outdated=[THRESHOLDS_NAME])
        checkpoint.unlink(missing_ok=True)
        self.figures["recovery"] = done.to_dict()
        self.tables.append(done.to_table())
        self._settings["recovered on"] = f"{training.name}: {job.train}, {self.figures['recovery']['best_step']} steps"

    def measure(self) -> None:
        self._measured = measure_sparsity(self._model, self._batches[:MEASURED_BATCHES])
        title = f"Sparsity on {min(self._job.num_batches, MEASURED_BATCHES)} calibration batches"
        title += f", calibrated in {self._seconds:.1f} s, peak memory {peak_memory() / 1e6:.0f} MB"
        self.tables.append(sparsity_table(self._measured, title))
        self.figures |= {
            "settings": self._settings,
            "calibration_seconds": round(self._seconds, 2),
            "processes": count_processes(),
            "peak_memory": peak_memory(),
            "calibration_sparsity": self._measured.to_dict(),
            "environment": describe_environment(),
        }
        self._report = self._evaluate()
        if self._report is not None:
            self.figures |= self._report.to_dict()

    def _evaluate(self) -> Report | None:
        job, text = self._job, self._text
        if text is None:
            return None
        self._say(f"evaluating on {text.name}")
        with suspend_sparsifiers(s for _, s in named_sparsifiers(self._model)):
            dense = evaluate_cost(self._model, self._tokenizer, text.pages, max_length=job.max_length)
        sparse = evaluate_cost(self._model, self._tokenizer, text.pages, max_length=job.max_length)
        name = "recovered, without masks" if job.trains_weights else "dense"
        rows = (Row(name, dense), Row("sparse", sparse, self._seconds))
        return Report(f"What the masks of {job.model} cost", rows, {**self._settings, "evaluation text": text.name})

    def judge(self) -> bool:
        if self._job.fail_above is None:
            return True
        assert self._report is not None
        assert self._text is not None
        dense, sparse = self._report.rows
        verdict = judge(self._job.fail_above, dense, sparse, self._text.name)
        self.figures["gate"] = verdict.to_dict()
        return verdict.has_passed

    def publish(self) -> None:
        job = self._job
        # Whoever finds an OpenVINO model takes it: at no moment may one with other masks lie beside new thresholds.
        if not job.accelerate:
            _withdraw_model(job.out)
        elif is_first():
            self._deploy()
        source = str(job.out.resolve()) if job.trains_weights else _absolute(job.model)
        notes = {"source": source, "int8": job.int8, "calibration": self._settings["calibration text"]}
        path = job.out / THRESHOLDS_NAME
        save_thresholds(self._model, path, **notes, measured_sparsity=self._measured.sparsity)
        # Only now: after a conversion that failed, or a full disk, the next run need not calibrate again.
        self._kept.forget()
        wait_for_all()

    def _deploy(self) -> None:
        from actsparse.openvino import deploy_model

        self._say("converting the model to OpenVINO and accelerating it")
        acceleration = deploy_model(self._model, self._job.out, self._tokenizer, exact=self._job.exact)
        self.figures["acceleration"] = asdict(acceleration)
        self.tables.append(acceleration_table(acceleration))

    def withdraw(self) -> None:
        """Remove the thresholds and the OpenVINO model that an earlier run has left for others to use."""
        if is_first():
            (self._job.out / THRESHOLDS_NAME).unlink(missing_ok=True)
        _withdraw_model(self._job.out)
        self._kept.forget()

    def report(self) -> None:
        out = self._job.out
        if self._report is None:
            write_json(out / "report.json", self.figures)
            plot_sparsity_by_layer({"calibration batches": self._measured}, out / "sparsity_by_layer.png")
        else:
            write_report(self._report, out, self.figures)
            self.tables.append(self._report.to_table())


def _withdraw_model(out: Path) -> None:
    """Remove an earlier run's OpenVINO model, if its report says that it is one: its masks are others."""
    earlier = read_json(out / "report.json") if is_first() else None
    if isinstance(earlier, dict) and "acceleration" in earlier:
        for file in (Path(MODEL_FILE), Path(MODEL_FILE).with_suffix(".bin")):
            (out / file).unlink(missing_ok=True)


def name_calibration(job: SparsifyJob, model: Any, batches: list[Any]) -> str:
    """
    Identify a calibration, so that what was measured for another one is not taken for this one's.

    :return: A hexadecimal digest of model, data, versions, and all settings but those in `NEVER_MEASURED_WITH`.
    """
    wanted = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in NEVER_MEASURED_WITH}
    # Shapes alone do not tell two trainings of one model apart; some of each parameter's entries do. Copied, because a
    # view would hold all of a weight that was read from disk.
    weights = [weight.flatten()[:: max(1, weight.numel() // 64)].clone() for weight in every_weight(model)]
    return digest_of([fingerprint(model), repr(wanted), json.dumps(library_versions()), weights, batches]).hex()


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name

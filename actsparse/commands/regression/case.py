"""What a regression case says: which model is masked how, and on what that is measured."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actsparse.algorithms import get_algorithm
from actsparse.commands.common import DTYPES
from actsparse.commands.regression.records import NOT_IN_FILE, make_mapping, read_record
from actsparse.errors import SourceError, nearest, shorten_message
from actsparse.mask import TOKENS
from actsparse.scopes.matching import validate_targets
from actsparse.scopes.target_scope import TargetScope
from actsparse.texts.files import NAMED_SOURCES
from actsparse.torch.compression import WEIGHT_MODES

BACKENDS = ("torch", "openvino")
CASE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}")


@dataclass(frozen=True)
class Target:
    """Layers, and how sparse they shall be; see `TargetScope`."""

    sparsity: float
    roles: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibration:
    """The text that thresholds are found on: a source as on the command line, and what is taken of it."""

    text: str = "default"
    batches: int = 32
    length: int = 256


@dataclass(frozen=True)
class Evaluation:
    """The text that perplexity and sparsity are measured on: a source, its first pages, and the window in tokens."""

    text: str = "default"
    pages: int | None = None
    max_length: int = 512


@dataclass(frozen=True)
class Case:
    """
    A regression case: everything that decides its figures, as its file says it.

    :param model: A folder, a GGUF file, a hub id, or ``default``.
    :param revision: Of a model of the hub: a branch, tag or commit.
    :param checksum: SHA-256 that the model's files must have; see `checksum_files`. None takes any.
    :param dtype: fp32, bf16 or fp16.
    :param weights: What `nncf.compress_weights` makes of them: a name of `WEIGHT_MODES`; None leaves them.
    :param group_size: Of INT4 weights.
    :param sparsity: One target for every Linear layer of the blocks; or else
    :param skip_first: How many tokens at the start of each sequence pass unmasked.
    :param backend: ``torch``, or ``openvino`` for the accelerated model that `deploy_model` makes.
    :param seed: Which windows of the calibration text are taken: 0 the first ones, another number a random choice
        among all. Nothing else is random.
    :param nncf: Whether to measure NNCF's own masks too, on the same model, batches and windows.
    :raises SourceError: If a value is not possible.
    :raises ActsparseError: If there is no such algorithm, role or target.
    """

    model: str
    revision: str | None = None
    checksum: str | None = None
    dtype: str = "fp32"
    weights: str | None = None
    group_size: int = 128
    sparsity: float | None = None
    targets: tuple[Target, ...] = ()
    ignored: tuple[str, ...] = ()
    algorithm: str = "magnitude"
    tokens: str = "all"
    skip_first: int = 0
    backend: str = "torch"
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    decode: bool = False
    nncf: bool = False
    name: str = field(default="case", metadata=NOT_IN_FILE)
    folder: Path = field(default=Path(), metadata=NOT_IN_FILE)

    def __post_init__(self) -> None:
        for key, choices in (("dtype", DTYPES), ("backend", BACKENDS), ("tokens", TOKENS)):
            _require_choice(key, getattr(self, key), tuple(choices))
        if self.weights is not None:
            _require_choice("weights", self.weights, tuple(WEIGHT_MODES))
        _require_at_least("skip_first", self.skip_first, 0)
        _require_at_least("seed", self.seed, 0)
        _require_at_least("group_size", self.group_size, 1)
        _require_at_least("calibration.batches", self.calibration.batches, 1)
        _require_at_least("calibration.length", self.calibration.length, 2)
        _require_at_least("evaluation.pages", 1 if self.evaluation.pages is None else self.evaluation.pages, 1)
        _require_at_least("evaluation.max_length", self.evaluation.max_length, 1)
        if self.checksum is not None and not re.fullmatch("[0-9a-f]{64}", self.checksum):
            msg = f"checksum takes a SHA-256 of 64 hexadecimal digits, not {self.checksum[:80]!r}"
            raise SourceError(msg)
        get_algorithm(self.algorithm)
        validate_targets(self.scopes, self.ignored_scope)
        self._require_backend()

    def _require_backend(self) -> None:
        if self.backend == "torch" and self.decode:
            msg = "decode: true times OpenVINO models; it takes backend: openvino"
            raise SourceError(msg)
        if self.backend == "openvino" and (self.skip_first or self.tokens != "all"):
            msg = "backend: openvino masks every token of a text; leave tokens and skip_first out"
            raise SourceError(msg)
        if self.nncf and (self.backend != "torch" or self.dtype != "fp32" or self.tokens != "all" or self.skip_first):
            msg = "nncf: true compares with NNCF's masks, which are in torch, in fp32 and on all tokens"
            raise SourceError(msg)

    @property
    def scopes(self) -> Any:
        """The targets as `sparsify_activations` takes them."""
        if (self.sparsity is None) == (not self.targets):
            msg = "a case has either sparsity, or targets"
            raise SourceError(msg)
        if self.sparsity is not None:
            return self.sparsity
        scopes: dict[TargetScope, float] = {}
        for target in self.targets:
            scope = TargetScope(names=list(target.names), patterns=list(target.patterns), roles=target.roles)
            if scope in scopes:
                msg = "two targets are for the same layers"
                raise SourceError(msg)
            scopes[scope] = target.sparsity
        return scopes

    @property
    def ignored_scope(self) -> TargetScope | None:
        """The layers to leave out."""
        return TargetScope(patterns=list(self.ignored)) if self.ignored else None

    def locate(self, source: str) -> Path:
        """
        Find where a path of the case leads.

        :return: The path, from the case's folder if it is a relative one; whether there is anything is not known.
        :raises SourceError: If it can be no path.
        """
        try:
            path = self.folder / Path(source).expanduser()
            path.exists()
        except (OSError, RuntimeError, ValueError) as error:
            msg = f"{self.name}: {source[:60]!r} can be no path: {shorten_message(error)}"
            raise SourceError(msg) from None
        return path

    def locate_text(self, source: str) -> str:
        """
        Find a text that the case names.

        :return: A named source as it is, a path as one that can be opened.
        :raises SourceError: If it can be neither.
        """
        return source if source in NAMED_SOURCES else str(self.locate(source))

    def to_dict(self) -> dict[str, Any]:
        """Turn the case into what its file could hold."""
        return make_mapping(self)


def read_case(path: str | Path) -> Case:
    """
    Read a case's file.

    :raises ActsparseError: If it cannot be read or says something impossible; names the file.
    """
    path = Path(path)
    if not CASE_NAME.fullmatch(path.stem):
        msg = f"{path.name!r} cannot name a case: letters, digits, dots, hyphens and underscores, 80 at most"
        raise SourceError(msg)
    return replace(read_record(path, Case, "the case"), name=path.stem, folder=path.parent)


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{key} is {value[:60]!r}; it is one of {', '.join(choices)} (nearest: {nearest(value, choices, 1)})"
        raise SourceError(msg)


def _require_at_least(key: str, value: int, least: int) -> None:
    if value < least:
        msg = f"{key} is {value}; it must be at least {least}"
        raise SourceError(msg)

"""The thresholds file: a small safetensors file beside an unchanged checkpoint, like an adapter."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from actsparse.environment import library_versions
from actsparse.errors import ThresholdsError
from actsparse.files import write_bytes
from actsparse.insertion import CHILD, insert_sparsifier, named_sparsifiers, remove_sparsifiers
from actsparse.scopes.layers import in_features, named_linears, out_features
from actsparse.sparsifier import TOKENS, ActivationSparsifier

FORMAT = "actsparse.thresholds"
FORMAT_VERSION = 1
_KEY = f".{CHILD}.threshold"


@dataclass(frozen=True)
class LayerRecord:
    """
    What the file says of one masked layer, besides its threshold.

    :param target_sparsity: The share of zeros asked for.
    :param tokens: Which tokens are masked, ``all`` or ``decode``.
    :param algorithm: The algorithm that found the threshold.
    :param site: Name of the site whose input is masked.
    :param roles: What the layer does in its block.
    """

    target_sparsity: float
    tokens: str
    algorithm: str
    site: str
    roles: tuple[str, ...]

    def __post_init__(self) -> None:
        target_is_valid = isinstance(self.target_sparsity, float | int) and 0 <= self.target_sparsity <= 1
        texts_are_valid = all(isinstance(text, str) for text in (self.algorithm, self.site, *self.roles))
        if not (target_is_valid and texts_are_valid and self.tokens in TOKENS):
            msg = "a layer's record is not one"
            raise ValueError(msg)


@dataclass(frozen=True)
class ThresholdsFile:
    """
    The contents of a thresholds file.

    :param thresholds: Thresholds by layer name, each 0-d or [in_features].
    :param layers: What else is known of each layer.
    :param fingerprint: Hash of the shapes of the model that the thresholds belong to.
    :param notes: Model name, calibration data, measured sparsity, library versions.
    """

    thresholds: dict[str, torch.Tensor]
    layers: dict[str, LayerRecord]
    fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)


def save_thresholds(model: nn.Module, path: str | Path, **notes: Any) -> None:
    """
    Write a model's thresholds; the model itself is not needed to be saved again.

    :param model: A masked model.
    :param path: The file to write; replaced as a whole or not at all.
    :param notes: What else to record, such as the calibration data: anything that JSON can hold.
    :raises ThresholdsError: If the model has no masks, or the notes are not JSON.
    :raises OutputError: If the file cannot be written.
    """
    sparsifiers = dict(named_sparsifiers(model))
    if not sparsifiers:
        msg = "the model has no activation sparsifiers whose thresholds could be saved"
        raise ThresholdsError(msg)
    records = {
        n: asdict(LayerRecord(s.target_sparsity, s.tokens, s.algorithm, s.site, s.roles))
        for n, s in sparsifiers.items()
    }
    described = {
        "model": model_name(model),
        "versions": library_versions(),
        **notes,
    }
    try:
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": fingerprint(model),
            "layers": json.dumps(records),
            "notes": json.dumps(described),
        }
    except (TypeError, ValueError) as error:
        msg = f"the notes for a thresholds file must be JSON: {error}"
        raise ThresholdsError(msg) from None
    tensors = {n + _KEY: s.threshold.detach().to("cpu", torch.float32).contiguous() for n, s in sparsifiers.items()}
    write_bytes(Path(path), save(tensors, metadata))


def load_thresholds(model: nn.Module, path: str | Path) -> nn.Module:
    """
    Mask a model with the thresholds of a file, replacing the masks that it may have.

    :param model: The model that the thresholds were calibrated on, compressed or not; changed in place.
    :param path: The file.
    :return: The same model.
    :raises ThresholdsError: If the file is missing, damaged, foreign, from a newer version or of another model; the
        model is then unchanged.
    """
    contents = read_thresholds(path)
    if contents.fingerprint != fingerprint(model):
        msg = (
            f"{path} belongs to another model ({contents.notes.get('model', 'unknown')}): "
            f"the Linear layers of {model_name(model)} have other names or shapes"
        )
        raise ThresholdsError(msg)
    linears = dict(named_linears(model))
    sparsifiers: dict[str, ActivationSparsifier] = {}
    for name, threshold in contents.thresholds.items():
        if name not in linears or threshold.shape not in ((), (in_features(linears[name]),)):
            msg = f"{path}: no Linear layer {name} of the model takes thresholds of shape {list(threshold.shape)}"
            raise ThresholdsError(msg)
        sparsifiers[name] = _make_sparsifier(contents.layers[name], threshold)
    remove_sparsifiers(model)
    for name, sparsifier in sparsifiers.items():
        insert_sparsifier(linears[name], sparsifier)
    return model


def read_thresholds(path: str | Path) -> ThresholdsFile:
    """
    Read and check a thresholds file without needing its model.

    :param path: The file.
    :return: Its contents.
    :raises ThresholdsError: If the file is missing, damaged, foreign or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"there is no thresholds file {path}"
        raise ThresholdsError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            thresholds = {key.removesuffix(_KEY): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ThresholdsError):
            raise
        msg = f"{path} is not a readable safetensors file: {error}"
        raise ThresholdsError(msg) from None
    try:
        return _parse(thresholds, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        msg = f"{path} is damaged: its thresholds and its metadata do not agree"
        raise ThresholdsError(msg) from None


def fingerprint(model: nn.Module) -> str:
    """
    Hash the names and shapes of a model's Linear layers, which compression does not change.

    :param model: A model, compressed or not, masked or not.
    :return: A hexadecimal digest.
    """
    shapes = [f"{name}:{in_features(module)}x{out_features(module)}" for name, module in named_linears(model)]
    return hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()


def model_name(model: nn.Module) -> str:
    """
    Name a model for a message or a report.

    :param model: The model.
    :return: The name or folder it was loaded from, or its class.
    """
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _make_sparsifier(record: LayerRecord, threshold: torch.Tensor) -> ActivationSparsifier:
    channels = threshold.numel() if threshold.ndim else None
    sparsifier = ActivationSparsifier(
        record.target_sparsity,
        channels=channels,
        tokens=record.tokens,
        roles=record.roles,
        site=record.site,
        algorithm=record.algorithm,
    )
    sparsifier.threshold.copy_(threshold)
    return sparsifier


def _parse(thresholds: dict[str, torch.Tensor], metadata: dict[str, str]) -> ThresholdsFile:
    records = json.loads(metadata["layers"])
    layers = {name: LayerRecord(**{**record, "roles": tuple(record["roles"])}) for name, record in records.items()}
    notes = json.loads(metadata["notes"])
    is_complete = bool(layers) and layers.keys() == thresholds.keys() and isinstance(notes, dict)
    if not is_complete or not all(map(_is_threshold, thresholds.values())):
        raise ValueError
    return ThresholdsFile(thresholds, layers, metadata["fingerprint"], notes)


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        msg = f"{path} is a safetensors file, but not one of actsparse's thresholds files"
        raise ThresholdsError(msg)
    number = metadata.get("format_version", "")
    if not (number.isascii() and number.isdigit()) or len(number) > 9:
        msg = f"{path} is damaged: its format version is {number[:20]!r}"
        raise ThresholdsError(msg)
    if int(number) > FORMAT_VERSION:
        msg = f"{path} has format version {number}; this actsparse reads up to {FORMAT_VERSION}: upgrade it"
        raise ThresholdsError(msg)


def _is_threshold(tensor: torch.Tensor) -> bool:
    if tensor.dtype != torch.float32 or tensor.ndim > 1 or tensor.numel() == 0:
        return False
    # Minus infinity masks nothing and is legitimate; NaN and plus infinity are not thresholds that data can give.
    return bool(((tensor >= 0) | (tensor == -math.inf)).all() and (tensor < math.inf).all())

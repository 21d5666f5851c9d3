"""The thresholds file: a small safetensors file beside an unchanged checkpoint, like an adapter."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from actsparse.backend import backend_of
from actsparse.errors import ActsparseError, ThresholdsError
from actsparse.mask import Compensation, Mask
from actsparse.runtime.environment import library_versions
from actsparse.scopes import LayerSize
from actsparse.storage.files import kind_of, write_bytes

FORMAT = "actsparse.thresholds"
FORMAT_VERSION = 4
# Tensors are named as in the masked model's state_dict.
_KEYS = tuple(f".activation_sparsifier.{tensor}" for tensor in ("threshold", "shift", "basis", "bias"))


@dataclass(frozen=True)
class ThresholdsFile:
    """
    The contents of a thresholds file.

    :param masks: Masks by layer name; each threshold is 0-d or [in_features].
    :param fingerprint: Hash of the shapes of the model that the thresholds belong to.
    :param notes: Model name, calibration data, measured sparsity, library versions.
    """

    masks: dict[str, Mask]
    fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def thresholds(self) -> dict[str, torch.Tensor]:
        """Thresholds by layer name, each 0-d or [in_features]."""
        return {name: mask.threshold for name, mask in self.masks.items()}


def save_thresholds(model: Any, path: str | Path, **notes: Any) -> None:
    """
    Write a model's thresholds; the model itself is not needed to be saved again.

    A file of a torch model fits the OpenVINO model converted from it, and the other way round.

    :param model: A masked torch module, `openvino.Model` or optimum-intel model.
    :param path: The file to write; replaced as a whole or not at all.
    :param notes: What else to record, such as the calibration data: anything that JSON can hold.
    :raises ThresholdsError: If the model has no masks, one that could not be loaded, or the notes are not JSON.
    :raises OutputError: If the file cannot be written.
    """
    masks = backend_of(model).masks()
    if not masks:
        msg = "the model has no activation sparsifiers whose thresholds could be saved"
        raise ThresholdsError(msg)
    _require_writable(masks)
    selection = next((mask.selection for mask in masks.values() if mask.selection), None)
    described = {
        "model": model_name(model),
        "versions": library_versions(),
        **({"selection": selection} if selection else {}),
        **notes,
    }
    try:
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "fingerprint": fingerprint(model),
            "layers": json.dumps({name: mask.to_record() for name, mask in masks.items()}),
            "notes": json.dumps(described),
        }
    except (TypeError, ValueError) as error:
        msg = f"the notes for a thresholds file must be JSON: {error}"
        raise ThresholdsError(msg) from None
    tensors = {}
    for name, mask in masks.items():
        for key, tensor in zip(_KEYS, (mask.threshold, *mask.compensation.tensors), strict=True):
            if tensor is not None:
                # Copied: layers of one site may share a tensor, which the format cannot say.
                tensors[name + key] = tensor.clone()
    write_bytes(Path(path), _in_order(save(tensors, metadata)))


def load_thresholds(model: Any, path: str | Path) -> Any:
    """
    Mask a model with the thresholds of a file, replacing the masks that it may have.

    :param model: The model that the thresholds were calibrated on, compressed or not, converted to OpenVINO or not;
        changed in place.
    :param path: The file.
    :return: The same model.
    :raises ThresholdsError: If the file is missing, damaged, foreign, from a newer version or of another model; the
        model is then unchanged.
    """
    contents, backend = read_thresholds(path), backend_of(model)
    with backend.editing():
        _check_fit(model, backend.sizes(), contents, path)
        try:
            backend.replace_masks(contents.masks)
        except ActsparseError as error:
            msg = f"{path}: {error}"
            raise ThresholdsError(msg) from None
    return model


def read_thresholds(path: str | Path) -> ThresholdsFile:
    """
    Read and check a thresholds file without needing its model.

    :param path: The file.
    :return: Its contents.
    :raises ThresholdsError: If the file is missing, damaged, foreign or from a newer version.
    """
    path = Path(path)
    if kind_of(path, ThresholdsError) != "file":
        msg = f"there is no thresholds file {path}"
        raise ThresholdsError(msg)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ThresholdsError):
            raise
        msg = f"{path} is not a readable safetensors file: {error}"
        raise ThresholdsError(msg) from None
    try:
        return _parse(tensors, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        msg = f"{path} is damaged: its thresholds and its metadata do not agree"
        raise ThresholdsError(msg) from None


def fingerprint(model: Any) -> str:
    """
    Hash the names and shapes of a model's Linear layers, which neither compression nor conversion changes.

    :param model: A model, compressed or not, masked or not.
    :return: A hexadecimal digest.
    """
    return _hash_shapes(backend_of(model).sizes())


def _hash_shapes(sizes: Mapping[str, LayerSize]) -> str:
    shapes = [f"{name}:{size.channels}x{size.outputs}" for name, size in sizes.items()]
    return hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()


def model_name(model: Any) -> str:
    """
    Name a model for a message or a report.

    :param model: The model.
    :return: The name or folder it was loaded from, or its class.
    """
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _require_writable(masks: Mapping[str, Mask]) -> None:
    for name, mask in masks.items():
        if mask.target_sparsity is None:
            msg = (
                f"the OpenVINO model does not say how the mask of {name} was made: "
                "export the torch model with actsparse.openvino.export_model, or save its thresholds"
            )
            raise ThresholdsError(msg)
        if not mask.can_be_saved:
            msg = (
                f"the mask of {name} cannot be saved: its threshold is neither a number from 0 on nor minus infinity, "
                "or what compensates for what it leaves out is not finite"
            )
            raise ThresholdsError(msg)


def _check_fit(model: Any, sizes: Mapping[str, LayerSize], contents: ThresholdsFile, path: str | Path) -> None:
    if contents.fingerprint != _hash_shapes(sizes):
        msg = (
            f"{path} belongs to another model ({contents.notes.get('model', 'unknown')}): "
            f"the Linear layers of {model_name(model)} have other names or shapes"
        )
        raise ThresholdsError(msg)
    for name, mask in contents.masks.items():
        size, shape = sizes.get(name), mask.threshold.shape
        if size is None or shape not in ((), (size.outputs if mask.is_of_rows else size.channels,)):
            msg = f"{path}: no Linear layer {name} of the model takes thresholds of shape {list(shape)}"
            raise ThresholdsError(msg)
        basis = mask.compensation.basis
        if basis is not None and basis.shape[0] != size.channels:
            msg = f"{path}: the low-rank part of {name} has {basis.shape[0]} channels, not {size.channels}"
            raise ThresholdsError(msg)
        bias = mask.compensation.bias
        if bias is not None and bias.shape[0] != size.channels:
            msg = f"{path}: the bias of {name} has {bias.shape[0]} channels, not {size.channels}"
            raise ThresholdsError(msg)


def _parse(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> ThresholdsFile:
    records, notes = json.loads(metadata["layers"]), json.loads(metadata["notes"])
    thresholds, *rest = ({n: tensors.pop(n + key) for n in records if n + key in tensors} for key in _KEYS)
    if not records or tensors or records.keys() != thresholds.keys() or not isinstance(notes, dict):
        raise ValueError
    masks = {}
    for name, record in records.items():
        compensation = Compensation(*(found.get(name) for found in rest))
        mask = Mask.from_record(thresholds[name], record, compensation)
        if not mask.can_be_saved:
            raise ValueError
        masks[name] = mask.with_selection(notes.get("selection"))
    return ThresholdsFile(masks, metadata["fingerprint"], notes)


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


def _in_order(file: bytes) -> bytes:
    """Sort the header of a safetensors file, whose metadata comes in another order each time it is written."""
    length = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    # As the format's own writer does, so that the numbers behind it are aligned.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + length :]

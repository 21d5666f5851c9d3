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

from actsparse.algorithms import AUTO
from actsparse.environment import library_versions
from actsparse.errors import ThresholdsError
from actsparse.experts import with_split_experts
from actsparse.files import kind_of, write_bytes
from actsparse.insertion import CHILD, insert_sparsifier, placed_sparsifiers, remove_sparsifier
from actsparse.openvino.detect import find_openvino_model, forget_compiled
from actsparse.scopes.layers import in_features, named_linears, out_features
from actsparse.sparsifier import LARGEST, TOKENS, ActivationSparsifier
from actsparse.stand_in import NOTHING, StandIn

FORMAT = "actsparse.thresholds"
FORMAT_VERSION = 3
# Tensors are named as in the masked model's state_dict.
_KEYS = tuple(f".{CHILD}.{tensor}" for tensor in ("threshold", "shift", "basis"))


@dataclass(frozen=True)
class LayerRecord:
    """
    What the file says of one masked layer, besides its threshold.

    :param target_sparsity: The share of zeros asked for.
    :param tokens: Which tokens are masked, ``all`` or ``decode``.
    :param algorithm: The algorithm that found the threshold.
    :param site: Name of the site whose input is masked.
    :param roles: What the layer does in its block.
    :param gate_function: The activation function whose output is masked, where rows of the layer's weights are skipped
        and not input channels; else empty.
    :param skip_first: How many tokens at the start of a forward pass unmasked.
    """

    target_sparsity: float
    tokens: str
    algorithm: str
    site: str
    roles: tuple[str, ...]
    gate_function: str = ""
    skip_first: int = 0

    def __post_init__(self) -> None:
        target_is_valid = isinstance(self.target_sparsity, float | int) and 0 <= self.target_sparsity <= 1
        texts_are_valid = all(
            isinstance(text, str) for text in (self.algorithm, self.site, self.gate_function, *self.roles)
        )
        skip_is_valid = isinstance(self.skip_first, int) and 0 <= self.skip_first < 2**31
        if not (target_is_valid and texts_are_valid and skip_is_valid and self.tokens in TOKENS):
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
    :param stand_ins: What stands in for what is left out, by layer name, where that is not zeros.
    """

    thresholds: dict[str, torch.Tensor]
    layers: dict[str, LayerRecord]
    fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)
    stand_ins: dict[str, StandIn] = field(default_factory=dict)


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
    masks = _masks_of(model)
    if not masks:
        msg = "the model has no activation sparsifiers whose thresholds could be saved"
        raise ThresholdsError(msg)
    records = {name: asdict(record) for name, (_, record, _) in masks.items()}
    described = {
        "model": model_name(model),
        "versions": library_versions(),
        **_describe_selection(model),
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
    tensors = {}
    for name, (threshold, record, stand_in) in masks.items():
        # In f32 and copied: layers of one site may share a tensor, which the format cannot say.
        written, stands_in = _as_written(threshold), stand_in.to("cpu")
        if not _is_mask(written, record, stands_in):
            msg = (
                f"the mask of {name} cannot be saved: its threshold is neither a number from 0 on nor minus infinity, "
                "or what stands in for what it leaves out is not finite"
            )
            raise ThresholdsError(msg)
        for key, tensor in zip(_KEYS, (written, stands_in.shift, stands_in.basis), strict=True):
            if tensor is not None:
                tensors[name + key] = tensor
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
    contents = read_thresholds(path)
    with with_split_experts(model):
        _check_fit(model, contents, path)
        _replace_masks(model, contents)
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
    shapes = [f"{name}:{inputs}x{outputs}" for name, (inputs, outputs) in _sizes(model).items()]
    return hashlib.sha256("\n".join(sorted(shapes)).encode()).hexdigest()


def model_name(model: Any) -> str:
    """
    Name a model for a message or a report.

    :param model: The model.
    :return: The name or folder it was loaded from, or its class.
    """
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def torch_masks(model: nn.Module) -> dict[str, tuple[torch.Tensor, LayerRecord, StandIn]]:
    """
    Describe the masks of a torch model.

    :param model: The model.
    :return: By layer, the threshold, all that a thresholds file or an OpenVINO model records besides it, and what
        stands in for what is left out.
    """
    masks = {}
    for place, s in placed_sparsifiers(model):
        gate_function = place if s.rows_of else ""
        record = LayerRecord(s.target_sparsity, s.tokens, s.algorithm, s.site, s.roles, gate_function, s.skip_first)
        masks[s.rows_of or place] = (s.threshold, record, s.stand_in)
    return masks


def _describe_selection(model: Any) -> dict[str, Any]:
    """Say what was tried and chosen where an algorithm that chooses has set the thresholds."""
    masks = placed_sparsifiers(model) if isinstance(model, nn.Module) else ()
    selection = next((mask.selection for _, mask in masks if mask.selection), None)
    return {"selection": selection} if selection else {}


def _sizes(model: Any) -> dict[str, tuple[int, int]]:
    openvino_model = find_openvino_model(model)
    if openvino_model is None:
        return {name: (in_features(module), out_features(module)) for name, module in named_linears(model)}
    from actsparse.openvino.layers import named_calls

    calls = named_calls(openvino_model)
    return {name: (group[0].in_features, group[0].out_features) for name, group in calls.items()}


def _masks_of(model: Any) -> dict[str, tuple[torch.Tensor, LayerRecord, StandIn]]:
    openvino_model = find_openvino_model(model)
    if openvino_model is None:
        return torch_masks(model)
    from actsparse.openvino.placement import masks_of

    masks: dict[str, tuple[torch.Tensor, LayerRecord, StandIn]] = {}
    for name, mask in masks_of(openvino_model).items():
        if mask.record is None:
            msg = (
                f"the OpenVINO model does not say how the mask of {name} was made: "
                "export the torch model with actsparse.openvino.export_model, or save its thresholds"
            )
            raise ThresholdsError(msg)
        masks[name] = (torch.from_numpy(mask.threshold.copy()), mask.record, mask.stand_in)
    return masks


def _check_fit(model: Any, contents: ThresholdsFile, path: str | Path) -> None:
    if contents.fingerprint != fingerprint(model):
        msg = (
            f"{path} belongs to another model ({contents.notes.get('model', 'unknown')}): "
            f"the Linear layers of {model_name(model)} have other names or shapes"
        )
        raise ThresholdsError(msg)
    sizes = _sizes(model)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else None
    for name, threshold in contents.thresholds.items():
        gate_function = contents.layers[name].gate_function
        if name not in sizes or threshold.shape not in ((), (sizes[name][1 if gate_function else 0],)):
            msg = f"{path}: no Linear layer {name} of the model takes thresholds of shape {list(threshold.shape)}"
            raise ThresholdsError(msg)
        basis = contents.stand_ins.get(name, NOTHING).basis
        if basis is not None and basis.shape[0] != sizes[name][0]:
            msg = f"{path}: the low-rank part of {name} has {basis.shape[0]} channels, not {sizes[name][0]}"
            raise ThresholdsError(msg)
        if contents.layers[name].skip_first and modules is None:
            msg = f"{path} lets the first tokens pass (skip_first), which masks of an OpenVINO model cannot"
            raise ThresholdsError(msg)
        if gate_function and modules is not None and gate_function not in modules:
            msg = f"{path}: the model has no activation function {gate_function}"
            raise ThresholdsError(msg)


def _replace_masks(model: Any, contents: ThresholdsFile) -> None:
    openvino_model = find_openvino_model(model)
    if openvino_model is None:
        sparsifiers = {name: _make_sparsifier(name, contents) for name in contents.thresholds}
        for place, _ in list(placed_sparsifiers(model)):
            remove_sparsifier(model.get_submodule(place))
        for name, sparsifier in sparsifiers.items():
            insert_sparsifier(model, contents.layers[name].gate_function or name, sparsifier)
        return
    from actsparse.openvino.placement import LayerMask, replace_masks

    masks = {
        name: LayerMask.of(threshold, contents.layers[name], contents.stand_ins.get(name, NOTHING))
        for name, threshold in contents.thresholds.items()
    }
    replace_masks(openvino_model, masks)
    forget_compiled(model)


def _make_sparsifier(name: str, contents: ThresholdsFile) -> ActivationSparsifier:
    record, threshold = contents.layers[name], contents.thresholds[name]
    channels = threshold.numel() if threshold.ndim else None
    sparsifier = ActivationSparsifier(
        record.target_sparsity,
        channels=channels,
        tokens=record.tokens,
        roles=record.roles,
        site=record.site,
        algorithm=record.algorithm,
        rows_of=name if record.gate_function else "",
        skip_first=record.skip_first,
    )
    sparsifier.threshold.copy_(threshold)
    sparsifier.set_stand_in(contents.stand_ins.get(name, NOTHING))
    if record.algorithm.startswith(AUTO) and isinstance(contents.notes.get("selection"), dict):
        sparsifier.selection = contents.notes["selection"]
    return sparsifier


def _parse(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> ThresholdsFile:
    records = json.loads(metadata["layers"])
    layers = {name: LayerRecord(**{**record, "roles": tuple(record["roles"])}) for name, record in records.items()}
    notes = json.loads(metadata["notes"])
    thresholds, shifts, bases = ({n: tensors.pop(n + key) for n in layers if n + key in tensors} for key in _KEYS)
    is_complete = bool(layers) and not tensors and layers.keys() == thresholds.keys() and isinstance(notes, dict)
    stand_ins = {name: StandIn(shifts.get(name), bases.get(name)) for name in shifts.keys() | bases.keys()}
    if not is_complete or not all(_is_mask(thresholds[n], layers[n], stand_ins.get(n, NOTHING)) for n in layers):
        raise ValueError
    return ThresholdsFile(thresholds, layers, metadata["fingerprint"], notes, stand_ins)


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


def _as_written(threshold: torch.Tensor) -> torch.Tensor:
    written = threshold.detach().to("cpu", torch.float32).clone().contiguous()
    # A model cast to a smaller type after calibration has infinity for channels that never pass.
    return written.clamp(max=LARGEST) if written.ndim else written


def _is_mask(threshold: torch.Tensor, record: LayerRecord, stand_in: StandIn) -> bool:
    # Nothing can stand in for a row whose gate is closed.
    return _is_threshold(threshold) and _is_stand_in(stand_in) and not (record.gate_function and stand_in != NOTHING)


def _is_threshold(tensor: torch.Tensor) -> bool:
    if tensor.dtype != torch.float32 or tensor.ndim > 1 or tensor.numel() == 0:
        return False
    # Minus infinity masks nothing and is legitimate; NaN and plus infinity are not thresholds that data can give.
    return bool(((tensor >= 0) | (tensor == -math.inf)).all() and (tensor < math.inf).all())


def _is_stand_in(stand_in: StandIn) -> bool:
    return _has_form(stand_in.shift, ndim=0) and _has_form(stand_in.basis, ndim=2)


def _has_form(tensor: torch.Tensor | None, ndim: int) -> bool:
    if tensor is None:
        return True
    has_type = tensor.dtype == torch.float32 and tensor.ndim == ndim and tensor.numel() > 0
    return has_type and bool(tensor.isfinite().all())


def _in_order(file: bytes) -> bytes:
    """Sort the header of a safetensors file, whose metadata comes in another order each time it is written."""
    length = int.from_bytes(file[:8], "little")
    header = json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    # As the format's own writer does, so that the numbers behind it are aligned.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + length :]

"""Convert a masked torch model into an OpenVINO folder, its masks included."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import openvino as ov
import torch
from torch import nn

from actsparse.errors import ActsparseError, OutputError, one_line
from actsparse.mask import NO_COMPENSATION, Mask
from actsparse.openvino.folder import MODEL_FILE
from actsparse.openvino.layers import named_calls
from actsparse.openvino.masks import masks_of, replace_masks
from actsparse.openvino.require import missing_optimum
from actsparse.storage.files import as_os_error, publish, unfinished_folder
from actsparse.torch.insertion import named_masks, named_sparsifiers
from actsparse.torch.offload import require_weights
from actsparse.torch.wrappers import named_adapters, unwrap

Result = TypeVar("Result")

_TASK = "text-generation-with-past"
HALVES = (torch.bfloat16, torch.float16)


def export_model(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> Path:
    """
    Save a causal language model as an OpenVINO model, with its masks, by means of optimum-intel.

    The model may have been compressed by `nncf.compress_weights`, before or after it was masked. Export it with this
    function instead of `save_pretrained` and `OVModelForCausalLM.from_pretrained(…, export=True)`: that makes a new
    model of the checkpoint, which has no masks.

    :param model: A transformers model, masked or not; not changed.
    :param folder: Where to save: what `OVModelForCausalLM.from_pretrained` and `openvino.Core.read_model` load. It is
        made if it is missing; files of the same names are replaced.
    :param tokenizer: A transformers tokenizer to save beside it, also as an OpenVINO model if openvino-tokenizers is
        installed.
    :return: The folder.
    :raises ActsparseError: If optimum-intel is missing or cannot export the model, or a mask got lost.
    :raises OutputError: If the folder cannot be written.
    """
    write_model(model, folder, tokenizer, lambda converted: None)
    return Path(folder)


def write_model(model: nn.Module, folder: str | Path, tokenizer: Any, rewrite: Callable[[ov.Model], Result]) -> Result:
    """
    Convert a model, rewrite it, and save it once.

    :param model: As for `export_model`.
    :param folder: As for `export_model`.
    :param tokenizer: As for `export_model`.
    :param rewrite: Changes the converted model in place, before it is saved.
    :return: What `rewrite` returns.
    :raises ActsparseError: As `export_model`.
    """
    folder, model = Path(folder), unwrap(model)
    require_weights(model, "the export")
    require_exportable(model)
    masks = _active_masks(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(folder) as work, as_os_error():
            converted = ov.Core().read_model(run_optimum(_copy_to_export(model), work))
            _set_masks(converted, masks)
            result = rewrite(converted)
            if tokenizer is not None:
                save_tokenizer(tokenizer, work)
            finished = work / "finished"
            finished.mkdir()
            ov.save_model(converted, finished / MODEL_FILE, compress_to_fp16=False)
            others = [file for file in work.iterdir() if file.is_file() and file.stem != Path(MODEL_FILE).stem]
            publish([*others, *finished.iterdir()], folder, last=MODEL_FILE)
    except OSError as error:
        msg = f"{folder} cannot be written: {one_line(error)}"
        raise OutputError(msg) from error
    return result


def require_exportable(model: nn.Module) -> None:
    """
    Refuse what an export would refuse, before anything has been spent on it.

    :raises ActsparseError: If optimum-intel is missing or does not know the architecture, or there are adapters.
    """
    if next(named_adapters(model), None):
        msg = "the model has adapters beside its layers: merge them first, model = model.merge_and_unload()"
        raise ActsparseError(msg)
    try:
        from optimum.exporters.openvino import model_configs  # noqa: F401  (makes architectures known)
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        purpose = "exporting a model"
        raise missing_optimum(purpose) from None
    kind = getattr(getattr(model, "config", None), "model_type", "")
    try:
        known = TasksManager.get_supported_tasks_for_model_type(kind, "openvino", library_name="transformers")
    except KeyError:
        known = {}
    if _TASK not in known:
        msg = f"optimum-intel cannot export this {type(model).__name__}: it knows no language model of type {kind!r}"
        raise ActsparseError(msg)


def run_optimum(model: nn.Module, folder: Path, **options: Any) -> Path:
    """
    Have optimum-intel export a model, without a tokenizer; its traces stay on the model.

    :param model: A transformers model.
    :param folder: Where to write.
    :param options: What `export_from_model` takes besides.
    :return: The XML file.
    :raises ActsparseError: If optimum-intel is missing or cannot export the model.
    :raises OSError: If the folder cannot be written.
    """
    try:
        from optimum.exporters.openvino import export_from_model
    except ImportError:
        purpose = "exporting a model"
        raise missing_optimum(purpose) from None
    # Left to itself, it saves the tokenizer of the folder that the model was loaded from, or makes one up.
    options |= {"task": _TASK, "stateful": True, "preprocessors": []}
    # Traced in f32 on the weights as they are, which is what OpenVINO computes with them.
    options |= {"patch_16bit_model": model.dtype in HALVES}
    with warnings.catch_warnings():
        # What torch's tracer says of transformers' code.
        warnings.simplefilter("ignore")
        try:
            with as_os_error():
                export_from_model(model, output=folder, **options)  # type: ignore[arg-type]
        except OSError:
            raise
        except Exception as error:
            msg = f"optimum-intel cannot export this {type(model).__name__}: {one_line(error)}"
            raise ActsparseError(msg) from error
    return folder / MODEL_FILE


def _copy_to_export(model: nn.Module) -> nn.Module:
    # optimum-intel leaves traces on what it exports, down to the type of a parameter's values. The copy shares all
    # values, so it costs no memory.
    shared = {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in model.parameters()}
    shared |= {id(tensor): tensor.detach() for tensor in model.buffers()}
    copied = copy.deepcopy(model, shared).eval()
    modules: list[Any] = [*copied.modules()]
    for module in modules:
        # Of NNCF, what turns its weights back into floating point.
        if getattr(module, "result_dtype", None) in HALVES:
            module.result_dtype = torch.float32
    for _, sparsifier in named_sparsifiers(copied):
        # A trace of several tokens would not hold the masks of single ones, and zeros are where masks are found.
        sparsifier.tokens = "all"
        sparsifier.set_compensation(NO_COMPENSATION)
    return copied


def _active_masks(model: nn.Module) -> dict[str, Mask]:
    masks = named_masks(model, only_active=True)
    if any(mask.skip_first for mask in masks.values()):
        msg = "the masks of an OpenVINO model cannot let the first tokens pass: calibrate without skip_first to export"
        raise ActsparseError(msg)
    return masks


def _set_masks(converted: ov.Model, masks: dict[str, Mask]) -> None:
    """
    Make the converted model's masks what they would be had it been sparsified there: one for each site.

    :param converted: The model as optimum-intel converted it.
    :param masks: The torch model's masks by layer name.
    :raises ActsparseError: If the converted model lacks one.
    """
    calls, converted_masks = named_calls(converted), masks_of(converted)
    lost = next((name for name in masks if name not in calls or name not in converted_masks), None)
    if lost is not None:
        msg = f"the mask of layer {lost} got lost in the conversion to OpenVINO"
        raise ActsparseError(msg)
    replace_masks(converted, masks)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer beside a model, for transformers and, with openvino-tokenizers installed, for OpenVINO."""
    from optimum.exporters.openvino.convert import export_tokenizer

    tokenizer.save_pretrained(folder)
    # It turns the side that the tokenizer pads on; the caller's shall stay as it is.
    sides = tokenizer.padding_side, tokenizer.truncation_side
    try:
        export_tokenizer(tokenizer, folder, task="text-generation-with-past")
    finally:
        tokenizer.padding_side, tokenizer.truncation_side = sides

"""Save a masked torch model as an accelerated OpenVINO folder, and load such folders."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import openvino as ov
from torch import nn

from actsparse.errors import ActsparseError, OutputError, SourceError, shorten_message
from actsparse.openvino.acceleration import Acceleration, accelerate
from actsparse.openvino.build import extension_path
from actsparse.openvino.export import MODEL_FILE, export_model


def deploy_model(model: nn.Module, folder: str | Path, tokenizer: Any = None, *, exact: bool = False) -> Acceleration:
    """
    Save a masked torch model as an OpenVINO model that skips what its masks make useless.

    Any program loads it after `core.add_extension(actsparse.openvino.extension_path())`. Without a C++ compiler the
    portable model is saved, which computes the same and is no faster; one warning says so.

    :param model: A masked transformers model, compressed or not; not changed.
    :param folder: Where to save; files of the same names are replaced.
    :param tokenizer: A transformers tokenizer to save beside it.
    :param exact: See `accelerate`.
    :return: Which layers the kernel runs.
    :raises ActsparseError: If the model cannot be exported.
    :raises OutputError: If the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work, tempfile.TemporaryDirectory(dir=folder) as finished:
            export_model(model, work, tokenizer)
            converted = ov.Core().read_model(Path(work) / MODEL_FILE)
            acceleration = accelerate(converted, exact=exact)
            ov.save_model(converted, Path(finished) / MODEL_FILE, compress_to_fp16=False)
            del converted  # it maps the file that goes now
            others = [file for file in Path(work).iterdir() if file.stem != Path(MODEL_FILE).stem]
            # The model's description last: whoever finds it finds all else.
            for file in sorted([*others, *Path(finished).iterdir()], key=lambda file: file.name == MODEL_FILE):
                shutil.move(file, folder / file.name)
    except OSError as error:
        msg = f"{folder} cannot be written: {shorten_message(error)}"
        raise OutputError(msg) from error
    return acceleration


def load_causal_lm(folder: str | Path, **settings: Any) -> Any:
    """
    Load an OpenVINO folder, accelerated or not, as optimum-intel's model.

    :param folder: What `deploy_model` or `export_model` saved.
    :param settings: For `OVModelForCausalLM.from_pretrained`, such as `ov_config`.
    :return: An `OVModelForCausalLM`.
    :raises SourceError: If there is no OpenVINO model.
    :raises BuildError: If the model needs the extension and it cannot be built.
    """
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        msg = f"{folder} has no {MODEL_FILE}"
        raise SourceError(msg)
    try:
        from optimum.intel import OVModelForCausalLM
        from optimum.intel.openvino import modeling_base, modeling_decoder
    except ImportError:
        msg = "loading an OpenVINO folder takes optimum-intel: install actsparse[openvino]"
        raise ActsparseError(msg) from None
    if needs_extension(path):
        for module in (modeling_base, modeling_decoder):
            module.core.add_extension(str(extension_path()))
    try:
        return OVModelForCausalLM.from_pretrained(Path(folder), trust_remote_code=False, **settings)
    except (RuntimeError, ValueError, OSError) as error:
        msg = f"{folder} cannot be loaded: {shorten_message(error)}"
        raise SourceError(msg) from error


def needs_extension(path: Path) -> bool:
    """
    Tell whether a saved model has operations of the extension.

    :param path: The .xml file of a model.
    """
    return 'version="actsparse"' in path.read_text(encoding="utf-8")

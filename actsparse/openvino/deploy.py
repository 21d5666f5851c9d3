"""Save a masked torch model as an accelerated OpenVINO folder, and load such folders."""

from pathlib import Path
from typing import Any

from torch import nn

from actsparse.errors import SourceError, shorten_message
from actsparse.openvino.acceleration import Acceleration, accelerate
from actsparse.openvino.build import extension_path
from actsparse.openvino.export import write_model
from actsparse.openvino.folder import MODEL_FILE
from actsparse.openvino.require import missing_optimum
from actsparse.storage.files import kind_of


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
    return write_model(model, folder, tokenizer, lambda converted: accelerate(converted, exact=exact))


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
    if kind_of(path) != "file":
        msg = f"{folder} has no {MODEL_FILE}"
        raise SourceError(msg)
    try:
        from optimum.intel import OVModelForCausalLM
        from optimum.intel.openvino import modeling_base, modeling_decoder
    except ImportError:
        purpose = "loading an OpenVINO folder"
        raise missing_optimum(purpose) from None
    try:
        needs_it = needs_extension(path)
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {shorten_message(error)}"
        raise SourceError(msg) from None
    if needs_it:
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

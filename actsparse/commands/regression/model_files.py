"""Which model a case names, and a checksum of what it consists of."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from actsparse.commands.regression.case import Case
from actsparse.errors import SourceError, shorten_message
from actsparse.models.hub import fetch_from_hub
from actsparse.openvino.folder import MODEL_FILE
from actsparse.storage import assets

# What decides a model's outputs, of all that may lie in its folder.
_PARTS = ("config.json", "tokenizer*", "vocab.*", "merges.txt", "*.safetensors", "openvino_model.*")


@dataclass(frozen=True)
class ModelFiles:
    """
    Where a case's model lies.

    :param name: What `load_model` takes: a path, or ``default``.
    :param path: The file or folder.
    """

    name: str
    path: Path

    @property
    def is_openvino(self) -> bool:
        """Whether it is an OpenVINO model already."""
        return (self.path / MODEL_FILE).is_file()


def find_model(case: Case) -> ModelFiles:
    """
    Find a case's model, downloading one of the hub.

    :param case: The case.
    :return: Where it lies.
    :raises SourceError: If there is none, or it does not go with the rest of the case.
    """
    path = case.locate(case.model)
    is_local = case.model == "default" or path.exists()
    if is_local and case.revision is not None:
        msg = f"{case.name}: revision is for models of the hub; {case.model} is here, and checksum tells which it is"
        raise SourceError(msg)
    if case.model == "default":
        return ModelFiles("default", assets.fetch_model())
    if not is_local:
        if case.model.startswith((".", "/", "~")) or case.model.count("/") > 1:
            msg = f"{case.name}: there is no model at {path}"
            raise SourceError(msg)
        path = fetch_from_hub(case.model, revision=case.revision)
    found = ModelFiles(str(path), path)
    if found.is_openvino and (case.backend != "openvino" or case.weights is not None or case.dtype != "fp32"):
        rule = "it takes backend: openvino, and its weights stay as they are"
        msg = f"{case.name}: {case.model} is an OpenVINO model: {rule}"
        raise SourceError(msg)
    return found


def checksum_files(files: ModelFiles) -> str:
    """
    Hash a model: its weights, configuration and tokenizer.

    :param files: Where it lies.
    :return: SHA-256 of the file, as sha256sum prints it; of a folder, that of what sha256sum prints of its parts, in
        the order of their names.
    :raises SourceError: If a file cannot be read.
    """
    try:
        if files.path.is_file():
            return assets.file_sha256(files.path)
        parts = sorted({path.name for pattern in _PARTS for path in files.path.glob(pattern) if path.is_file()})
        listing = "".join(f"{assets.file_sha256(files.path / name)}  {name}\n" for name in parts)
    except OSError as error:
        msg = f"{files.path} cannot be read: {error.strerror or shorten_message(error)}"
        raise SourceError(msg) from None
    return hashlib.sha256(listing.encode()).hexdigest()

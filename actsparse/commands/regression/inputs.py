"""What a case runs on, its model and texts, and what of it has to be equal for figures to be comparable."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.commands.regression.case import Case
from actsparse.errors import SourceError, shorten_message
from actsparse.models.folder import is_openvino_folder
from actsparse.models.hub import fetch_from_hub
from actsparse.storage import assets
from actsparse.texts import Text, load_pages

# What decides a model's outputs, of all that may lie in its folder.
_PARTS = ("config.json", "tokenizer*", "vocab.*", "merges.txt", "*.safetensors", "openvino_model.*")


@dataclass(frozen=True)
class ModelFiles:
    """
    Where a case's model lies.

    :param name: What `load_model` takes: a path, or ``default``.
    """

    name: str
    path: Path

    @property
    def is_openvino(self) -> bool:
        """Whether it is an OpenVINO model already."""
        return is_openvino_folder(self.path)


@dataclass(frozen=True)
class Inputs:
    """What a case runs on."""

    model: ModelFiles
    model_sha256: str
    calibration: Text
    evaluation: Text

    def describe(self, case: Case) -> dict[str, str]:
        """
        List what has to be equal for figures to be comparable.

        :return: Texts by name: the case's settings, and the checksums of model and texts.
        """
        return describe_settings(case) | {
            "checksum of the model": self.model_sha256,
            "checksum of the calibration text": self.calibration.sha256,
            "checksum of the evaluation text": self.evaluation.sha256,
        }


def find_inputs(case: Case) -> Inputs:
    """
    Find a case's model and read its texts.

    :raises SourceError: If something is missing, or the model is not the one that the case's checksum names.
    """
    evaluation = load_pages(case.locate_text(case.evaluation.text), num_pages=case.evaluation.pages)
    calibration = load_pages(case.locate_text(case.calibration.text), purpose="calibration")
    model = find_model(case)
    found = checksum_files(model)
    if case.checksum not in (None, found):
        msg = f"{case.name}: the checksum of {case.model} is {found}, not {case.checksum}"
        raise SourceError(msg)
    return Inputs(model, found, calibration, evaluation)


def find_model(case: Case) -> ModelFiles:
    """
    Find a case's model, downloading one of the hub.

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


def describe_settings(case: Case) -> dict[str, str]:
    """
    List a case's settings.

    :return: Those that are not as by default, as texts by name.
    """
    # The checksum that a case asks for is not another model than the one that it gets.
    return _flatten({key: value for key, value in case.to_dict().items() if key != "checksum"})


def find_change(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """
    Tell what makes two runs incomparable.

    :param before: What `Inputs.describe` said of the one.
    :return: The first difference in words; None where there is none.
    """
    for name in dict.fromkeys((*now, *before)):
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name, 'as by default')} and is {now.get(name, 'as by default')}"
    return None


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat

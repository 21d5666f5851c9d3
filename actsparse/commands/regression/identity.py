"""What has to be equal for figures to be comparable: a case's settings, and the model and texts behind its names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actsparse.commands.regression.case import Case
from actsparse.commands.regression.model_files import ModelFiles, checksum_files, find_model
from actsparse.errors import SourceError
from actsparse.texts import Text, load_pages


@dataclass(frozen=True)
class Inputs:
    """
    What a case runs on.

    :param model: Where the model lies.
    :param model_sha256: Its checksum.
    :param calibration: The calibration text.
    :param evaluation: The evaluation text.
    """

    model: ModelFiles
    model_sha256: str
    calibration: Text
    evaluation: Text

    def describe(self, case: Case) -> dict[str, str]:
        """
        List what has to be equal for figures to be comparable.

        :param case: The case.
        :return: Texts by name: the case's settings, and the checksums of model and texts.
        """
        return describe_settings(case) | {
            "checksum of the model": self.model_sha256,
            "checksum of the calibration text": self.calibration.sha256,
            "checksum of the evaluation text": self.evaluation.sha256,
        }


def describe_settings(case: Case) -> dict[str, str]:
    """
    List a case's settings.

    :param case: The case.
    :return: Those that are not as by default, as texts by name.
    """
    # The checksum that a case asks for is not another model than the one that it gets.
    return _flatten({key: value for key, value in case.to_dict().items() if key != "checksum"})


def find_inputs(case: Case) -> Inputs:
    """
    Find a case's model and read its texts.

    :param case: The case.
    :return: What it runs on.
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


def find_change(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """
    Tell what makes two runs incomparable.

    :param before: What `Inputs.describe` said of the one.
    :param now: What it says of the other.
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

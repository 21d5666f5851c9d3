"""Save a model as a folder that loads, with its tokenizer."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from actsparse.errors import OutputError, shorten_message
from actsparse.models.quiet import quiet_libraries
from actsparse.storage.files import as_os_error, publish, unfinished_folder

_CONFIG = "config.json"
_WEIGHTS = "model*.safetensors*"


def save_folder(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    outdated: Iterable[str] = (),
) -> None:
    """
    Save a model and its tokenizer; the folder holds the old model, the new one or, for a moment, none.

    :param folder: An existing folder; files of the same names and an earlier model's weights are replaced.
    :param weights: What to save in place of the model's own state.
    :param outdated: Names of files that belong to the model that is replaced, and go with it.
    :raises OutputError: If the folder cannot be written; what was there before is then still there.
    """
    try:
        with unfinished_folder(folder) as work, quiet_libraries(), as_os_error():
            model.save_pretrained(work, state_dict=weights)
            tokenizer.save_pretrained(work)
            files = list(work.iterdir())
            (folder / _CONFIG).unlink(missing_ok=True)
            # Weights in one file would be read in place of new ones in several, and the other way round.
            old_weights = {path.name for path in folder.glob(_WEIGHTS)} - {file.name for file in files}
            for name in (*outdated, *old_weights):
                (folder / name).unlink(missing_ok=True)
            publish(files, folder, last=_CONFIG)
    except OSError as error:
        msg = f"cannot write the model to {folder}: {error.strerror or shorten_message(error)}"
        raise OutputError(msg) from error

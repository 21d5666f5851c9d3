"""What a model's name stands for at this moment."""

from typing import Any

from actsparse.errors import SourceError
from actsparse.models.hub import fetch_from_hub
from actsparse.models.load import find_local
from actsparse.storage import assets

# What decides a model's outputs, of all that may lie in its folder: results may be written there too.
_PARTS = (
    "*config.json",
    "model*.safetensors*",
    "openvino_model.*",
    "*tokenizer*",
    "*tokens*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


def model_identity(name: str) -> Any:
    """
    Tell a model from others of its name, such as a later training in the same folder, without reading its weights.

    :param name: The model, as for `load_model`; one of the hub is downloaded.
    :return: What can be written as JSON: the default model's checksum; or where the model lies (the hub's models by
        revision), and the sizes and times of its files.
    :raises SourceError: If there is no such model or its files cannot be listed.
    """
    if name == "default":
        return assets.MODEL_PACKAGE.members[0].sha256
    path = find_local(name) or fetch_from_hub(name)
    try:
        files = {file for part in _PARTS for file in path.glob(part)} if path.is_dir() else {path}
        stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise SourceError(msg) from None
    return [str(path.resolve()), stats]

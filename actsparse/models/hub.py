"""Models from the hub."""

from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from actsparse.errors import SourceError, shorten_message

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Seconds to wait for the hub's first answer.
_TIMEOUT_S = 10.0


def fetch_from_hub(name: str, *, revision: str | None = None) -> Path:
    """
    Download a model from the hub, or find its earlier download where the hub cannot be reached.

    :param revision: A branch, tag or commit; None takes the main branch.
    :raises SourceError: If the hub cannot be reached, or has no such model for this user.
    """
    patterns: dict[str, Any] = {"allow_patterns": _FILES, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        validate_repo_id(name)
        try:
            # snapshot_download alone would wait without limit for a hub that accepts connections but does not answer.
            HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_S)
            is_reached = True
        except (httpx.TransportError, OfflineModeIsEnabled):
            is_reached = False
        folder = snapshot_download(name, revision=revision, local_files_only=not is_reached, **patterns)
    except HFValidationError as error:
        msg = f"there is no model at {name!r}, and it is no hub id; give a folder, a .gguf file, or `default`"
        raise SourceError(msg) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        msg = f"cannot reach the model hub for {name!r}; `default`, a local folder and a .gguf file work without it"
        raise SourceError(msg) from error
    except GatedRepoError as error:
        msg = f"{name!r} on the model hub asks for a log-in and for its terms to be accepted; run `hf auth login`"
        raise SourceError(msg) from error
    except RepositoryNotFoundError as error:
        msg = f"the model hub has no model {name!r} that this user may read, and there is no such folder here"
        raise SourceError(msg) from error
    except OSError as error:
        msg = f"cannot download {name!r} from the model hub: {shorten_message(error)}"
        raise SourceError(msg) from error
    return Path(folder)

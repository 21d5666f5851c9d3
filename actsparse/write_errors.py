"""What libraries raise where a disk is full, as the OSError that it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

# All that OpenVINO says of a file that it cannot write.
_STREAM_ERROR = "iostream error"


@contextmanager
def as_os_error() -> Iterator[None]:
    """
    Turn the errors of libraries that write files themselves into OSErrors.

    :raises OSError: In place of safetensors', tokenizers' and OpenVINO's own errors.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if _STREAM_ERROR not in str(error):
            raise
        msg = "OpenVINO could not write all of a model; is the disk full?"
        raise OSError(msg) from error
    except Exception as error:
        # tokenizers raises nothing more special.
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error

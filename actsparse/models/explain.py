"""The libraries' errors, in one line of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from actsparse.errors import SourceError, shorten_message

# What the loading libraries raise at files that are damaged or of another kind.
_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)


@contextmanager
def explain_errors(name: str) -> Iterator[None]:
    """
    Turn whatever the loading libraries raise at unusable files into one line.

    :param name: What to call the model in the message.
    :raises SourceError: In place of the libraries' errors.
    """
    try:
        yield
    except SourceError:
        raise
    except (ImportError, NameError) as error:
        msg = f"cannot load {name} without a package that is missing: {shorten_message(error)}"
        raise SourceError(msg) from error
    except Exception as error:
        # tokenizers raises nothing more special than Exception itself.
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
            raise
        reason = shorten_message(error)
        msg = f"cannot load {name}, which may be damaged, incomplete or of a kind not supported: {reason}"
        raise SourceError(msg) from error

"""Say at once, and in one line, that an optional package is missing."""

from importlib.util import find_spec

from actsparse.errors import ActsparseError


def missing_optimum(purpose: str) -> ActsparseError:
    """
    Make the error of a missing optimum-intel.

    :return: The error to raise.
    """
    return ActsparseError(f"{purpose} takes optimum-intel: pip install 'actsparse[openvino]'")


def require_optimum(purpose: str) -> None:
    """
    Check that optimum-intel is installed.

    :param purpose: What takes it, for the message.
    :raises ActsparseError: If it is not.
    """
    if find_spec("optimum") is None or find_spec("optimum.intel") is None:
        raise missing_optimum(purpose)

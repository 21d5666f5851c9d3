"""Say at once, and in one line, that an optional package is missing."""

from importlib.util import find_spec

from actsparse.errors import ActsparseError


def require_optimum() -> None:
    """
    Check that optimum-intel is installed.

    :raises ActsparseError: If it is not.
    """
    if find_spec("optimum") is None or find_spec("optimum.intel") is None:
        msg = "this takes optimum-intel: install actsparse[openvino]"
        raise ActsparseError(msg)

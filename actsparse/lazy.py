"""Import a package's public names when they are first asked for (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def export_lazily(
    namespace: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Make a package's `__getattr__` and `__dir__`.

    :param namespace: The package's `globals()`.
    :param homes: The module that each public name lives in, relative to the package.
    :return: Both functions.
    """
    package = namespace["__name__"]

    def get(name: str) -> Any:
        if name not in homes:
            msg = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(msg)
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    def list_names() -> list[str]:
        return sorted({*namespace, *homes})

    return get, list_names

"""From mappings, as files hold them, to frozen dataclasses: every key and every type is checked."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from actsparse.errors import SourceError, nearest

Record = TypeVar("Record")
# For `dataclasses.field`: what a record knows beside what its file says.
NOT_IN_FILE = {"is_in_file": False}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def make_record(kind: type[Record], contents: Any, where: str) -> Record:
    """
    Make a dataclass of a mapping.

    Fields are text, numbers, booleans, tuples (lists in the file), dicts, other dataclasses, or one of those or None.

    :param kind: The dataclass; a field without a default has to be in the mapping.
    :param contents: The mapping.
    :param where: What error messages call it.
    :return: The record.
    :raises SourceError: If a key is unknown or missing, or a value has another type.
    """
    if not isinstance(contents, dict):
        msg = f"{where} takes keys with values, not {_show(contents)}"
        raise SourceError(msg)
    fields = {field.name: field for field in _fields_in_file(kind)}
    for key in contents:
        if key not in fields:
            msg = f"{where} has the unknown key {_show(key)}; nearest: {nearest(key[:60], fields)}"
            raise SourceError(msg)
    for name, field in fields.items():
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if name not in contents and not has_default:
            msg = f"{where} lacks the key {name!r}"
            raise SourceError(msg)
    hints = typing.get_type_hints(kind)
    return kind(**{name: _convert(hints[name], value, f"{name} of {where}") for name, value in contents.items()})


def make_mapping(record: Any) -> dict[str, Any]:
    """
    Make a mapping of a dataclass, for a file: the way back of `make_record`.

    :param record: The record.
    :return: Its fields, those that are as by default left out; tuples as lists.
    """
    shown = {}
    for field in _fields_in_file(record):
        value = getattr(record, field.name)
        if value != field.default and not (field.default_factory is dict and not value):
            shown[field.name] = _flatten(value)
    return shown


def _fields_in_file(record: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(record) if field.metadata.get("is_in_file", True)]


def _flatten(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return make_mapping(value)
    if isinstance(value, dict):
        return {key: _flatten(item) for key, item in value.items()}
    return [_flatten(item) for item in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        return _convert_list(arguments, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            msg = f"{where} takes keys with values, not {_show(value)}"
            raise SourceError(msg)
        return {key: _convert(arguments[1], item, f"{_show(key)} in {where}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return make_record(typing.cast(Any, hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            msg = f"{where} takes a number that a float can hold, not {_show(value)}"
            raise SourceError(msg) from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        msg = f"{where} takes {_NAMES[hint]}, not {_show(value)}"
        raise SourceError(msg)
    if isinstance(value, float) and not math.isfinite(value):
        msg = f"{where} takes a finite number, not {value}"
        raise SourceError(msg)
    return value


def _convert_list(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    is_open = arguments[-1] is Ellipsis
    if not isinstance(value, list) or not (is_open or len(value) == len(arguments)):
        size = "" if is_open else f" of {len(arguments)}"
        msg = f"{where} takes a list{size}, not {_show(value)}"
        raise SourceError(msg)
    hints = [arguments[0]] * len(value) if is_open else arguments
    items = enumerate(zip(hints, value, strict=True), start=1)
    return tuple(_convert(hint, item, f"item {number} of {where}") for number, (hint, item) in items)


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"

"""Records: dataclasses that files hold, in plain YAML that people write, or in JSON; every key and type is checked."""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from yaml import MarkedYAMLError

from actsparse.errors import ActsparseError, SourceError, nearest, shorten_message
from actsparse.storage.files import write_bytes

Record = TypeVar("Record")
# For `dataclasses.field`: what a record knows beside what its file says.
NOT_IN_FILE = {"is_in_file": False}
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
# The parser reads about 50 kB a second; a case is a few lines, a reference some hundred.
MAX_BYTES = 256 * 1024
_MAX_DEPTH = 12
_TYPES = {
    "null": ("~|null|", "~n"),
    "bool": ("true|false", "tf"),
    "int": ("[-+]?[0-9]{1,18}", "-+0123456789"),
    "float": (r"[-+]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?", "-+.0123456789"),
}


def read_record(path: Path, kind: type[Record], where: str) -> Record:
    """
    Read a YAML file that holds a record.

    :raises SourceError: If the file cannot be read, or says something impossible; names the file.
    """
    contents = read_yaml(path)
    try:
        return make_record(kind, contents, where)
    except ActsparseError as error:
        msg = f"{path}: {error}"
        raise SourceError(msg) from None


def make_record(kind: type[Record], contents: Any, where: str) -> Record:
    """
    Make a dataclass of a mapping.

    Fields are text, numbers, booleans, tuples (lists in the file), dicts, other dataclasses, or one of those or None.

    :param kind: The dataclass; a field without a default has to be in the mapping.
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


class _SafeLoader(yaml.SafeLoader):
    """Read mappings, lists, text, numbers, booleans and null; refuse tags, anchors, repeated keys, deep nesting."""

    # Not YAML 1.1's, of which `no` is false, 1:30 is 90, and 2026-01-01 a date.
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse("an alias is not accepted here", event.start_mark)
        if event.anchor is not None or getattr(event, "tag", None) is not None:
            _refuse(f"{'a tag' if event.anchor is None else 'an anchor'} is not accepted here", event.start_mark)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            _refuse(f"it is nested deeper than {_MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key is not text", key.start_mark)
            if key.value in found:
                _refuse(f"the key {key.value[:60]!r} stands twice", key.start_mark)
            found[key.value] = self.construct_object(value, deep=deep)
        return found

    def construct_yaml_int(self, node: Any) -> int:
        # In YAML 1.1, 010 is 8 and 08 nothing at all.
        return int(node.value)


_SafeLoader.add_constructor("tag:yaml.org,2002:int", _SafeLoader.construct_yaml_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Read a YAML file that holds one mapping.

    :return: What it holds: dicts, lists, text, numbers, booleans and None.
    :raises SourceError: If it cannot be read, is too large, or has anything else in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read: {getattr(error, 'strerror', None) or shorten_message(error)}"
        raise SourceError(msg) from None
    if len(data) > MAX_BYTES:
        msg = f"{path} is larger than {MAX_BYTES // 1024} kB, which no file of this kind is"
        raise SourceError(msg)
    try:
        contents = yaml.load(data.decode("utf-8-sig"), _SafeLoader)
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text (at byte {error.start})"
        raise SourceError(msg) from None
    except yaml.YAMLError as error:
        msg = f"{path} is no YAML that is read here: {_describe(error)}"
        raise SourceError(msg) from None
    if not isinstance(contents, dict):
        msg = f"{path} holds no keys with values"
        raise SourceError(msg)
    return contents


def write_yaml(path: Path, contents: dict[str, Any], heading: str) -> None:
    """
    Write a YAML file, whole or not at all.

    :param contents: Dicts, lists, text, numbers, booleans and None.
    :raises OutputError: If it cannot be written.
    """
    text = yaml.dump(contents, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True, width=110)
    write_bytes(path, f"# {heading}\n{text}".encode())


class _SafeDumper(yaml.SafeDumper):
    """Write no aliases, whatever object stands twice, and text in quotes that any reader takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _TYPES.items():
    for _kind in (_SafeLoader, _SafeDumper):
        _starts = [*_first, *([""] if _name == "null" else [])]
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)


def _refuse(message: str, mark: Any) -> None:
    raise MarkedYAMLError(problem=message, problem_mark=mark)


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None)
    return where + (" ".join(problem.split()) if problem else shorten_message(error))

"""YAML that people write and programs read: the part of it that holds no surprises, and no way to hang."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml import MarkedYAMLError

from actsparse.errors import SourceError, shorten_message
from actsparse.storage.files import write_bytes

# The parser reads about 50 kB a second; a case is a few lines, a reference some hundred.
MAX_BYTES = 256 * 1024
_MAX_DEPTH = 12
_TYPES = {
    "null": ("~|null|", "~n"),
    "bool": ("true|false", "tf"),
    "int": ("[-+]?[0-9]{1,18}", "-+0123456789"),
    "float": (r"[-+]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?", "-+.0123456789"),
}


class _Loader(yaml.SafeLoader):
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


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Read a YAML file that holds one mapping.

    :param path: The file.
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
    loader = None
    try:
        loader = _Loader(data.decode("utf-8-sig"))
        contents = loader.get_single_data()
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text (at byte {error.start})"
        raise SourceError(msg) from None
    except yaml.YAMLError as error:
        msg = f"{path} is no YAML that is read here: {_describe(error)}"
        raise SourceError(msg) from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(contents, dict):
        msg = f"{path} holds no keys with values"
        raise SourceError(msg)
    return contents


def write_yaml(path: Path, contents: dict[str, Any], heading: str) -> None:
    """
    Write a YAML file, whole or not at all.

    :param path: The file.
    :param contents: Dicts, lists, text, numbers, booleans and None.
    :param heading: What its first line says.
    :raises OutputError: If it cannot be written.
    """
    text = yaml.dump(contents, Dumper=_SafeDumper, sort_keys=False, allow_unicode=True, width=110)
    write_bytes(path, f"# {heading}\n{text}".encode())


class _SafeDumper(yaml.SafeDumper):
    """Write no aliases, whatever object stands twice, and text in quotes that any reader takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _TYPES.items():
    for _kind in (_Loader, _SafeDumper):
        _starts = [*_first, *([""] if _name == "null" else [])]
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)


def _refuse(message: str, mark: Any) -> None:
    raise MarkedYAMLError(problem=message, problem_mark=mark)


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None)
    return where + (" ".join(problem.split()) if problem else shorten_message(error))

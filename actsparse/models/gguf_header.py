"""Whether a GGUF file holds all that its header speaks of; the reader would look for the rest without end."""

import struct
from pathlib import Path
from typing import BinaryIO

from actsparse.errors import SourceError

# Bytes of a value, by GGUF's number for its type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_DEEPEST = 8
_LONGEST_KEY = 100
# What files say that `llama-gguf-split` made.
_COUNT, _NUMBER = "split.count", "split.no"
_WHOLE_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}


def check_header(path: Path) -> None:
    """
    Walk through a GGUF file's header.

    :param path: A file that begins as GGUF files do.
    :raises ValueError: If the header is cut short, or counts more than the file has.
    :raises SourceError: If the file is one of the parts of a model.
    """
    with path.open("rb") as stream:
        parts = _Header(stream, path.stat().st_size).walk()
    count = parts.get(_COUNT, 1)
    if count > 1:
        msg = f"{path.name} is part {parts.get(_NUMBER, 0) + 1} of {count} of a split GGUF file; join them:"
        msg += " llama-gguf-split --merge FIRST_PART WHOLE.gguf"
        raise SourceError(msg)


class _Header:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._order = "<"

    def walk(self) -> dict[str, int]:
        """Return what the file says of its parts."""
        parts: dict[str, int] = {}
        self._skip(4)
        if self._number("I") & 0xFFFF == 0:  # a version written by a big-endian machine
            self._order = ">"
        num_tensors, num_fields = self._number("Q"), self._number("Q")
        for _ in range(num_fields):
            key = self._read_string()
            kind = self._number("I")
            if key in (_COUNT, _NUMBER) and kind in _WHOLE_NUMBERS:
                parts[key] = self._number(_WHOLE_NUMBERS[kind])
            else:
                self._skip_value(kind)
        for _ in range(num_tensors):
            self._skip_string()
            # Dimensions, then the type and where the data begins.
            self._skip(8 * self._number("I") + 12)
        return parts

    def _skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == _STRING:
            self._skip_string()
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, length = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._skip(_SIZES[inner] * length)
                return
            for _ in range(length):
                self._skip_value(inner, depth + 1)
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            msg = f"it has a value of unknown type {kind}"
            raise ValueError(msg)

    def _skip_string(self) -> None:
        self._skip(self._number("Q"))

    def _read_string(self) -> str:
        length = self._number("Q")
        data = self._stream.read(min(length, _LONGEST_KEY))
        self._skip(length - len(data))
        return data.decode(errors="replace")

    def _skip(self, length: int) -> None:
        if self._stream.tell() + length > self._size:
            msg = "it ends before its header does"
            raise ValueError(msg)
        self._stream.seek(length, 1)

    def _number(self, form: str) -> int:
        data = self._stream.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            msg = "it ends before its header does"
            raise ValueError(msg)
        return struct.unpack(self._order + form, data)[0]

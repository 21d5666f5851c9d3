"""GGUF files that cannot be used."""

import struct
from pathlib import Path

import pytest

from actsparse.errors import SourceError
from actsparse.models import gguf, load_model


def _header(tensors: int = 0, fields: int = 0) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"hello", "is not a GGUF file"),
        (b"GGUF", "damaged"),
        (b"GGUF" * 999, "damaged"),
        (_header(fields=2**60), "ends before its header does"),
        (_header(fields=1) + struct.pack("<QIIQ", 0, 9, 8, 2**60), "ends before its header does"),
        (_header(fields=1) + struct.pack("<QIIQ", 0, 9, 4, 2**60), "ends before its header does"),
        (_header(fields=1) + struct.pack("<QIIQ", 0, 9, 9, 1) + struct.pack("<IQ", 9, 1) * 20, "unknown type 9"),
        (_header(fields=1) + struct.pack("<QI", 0, 77), "unknown type 77"),
        (_header(tensors=2**60), "ends before its header does"),
    ],
    ids=["empty", "text", "magic only", "garbage", "fields", "array", "numbers", "nested", "type", "tensors"],
)
def test_a_file_that_is_no_gguf_model_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_gguf_without_its_packages_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install 'actsparse\[hub\]'"):
        load_model(str(path))

"""GGUF files that cannot be used."""

from pathlib import Path

import pytest

from actsparse.errors import SourceError
from actsparse.models import gguf, load_model


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is not a GGUF file"), (b"hello", "is not a GGUF file"), (b"GGUF", "damaged"), (b"GGUF" * 999, "damaged")],
    ids=["empty", "text", "header only", "garbage"],
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

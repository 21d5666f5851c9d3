"""llama.cpp as a peer: built from the source that a Python package carries, once, into the cache."""

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from command import announce

from actsparse.console.report import read_json
from actsparse.errors import ActsparseError, SourceError
from actsparse.runtime.environment import count_cores
from actsparse.storage.assets import cache_dir, partial_folder

VERSION = "0.3.36"
_PACKAGE = f"llama-cpp-python=={VERSION}"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# What the processor must have for each of llama.cpp's options. Asking it to look by itself (GGML_NATIVE) makes programs
# that end at an illegal instruction where a virtual machine hides some of what its processor has.
_INSTRUCTIONS = {
    "GGML_SSE42": {"sse4_2"},
    "GGML_AVX": {"avx"},
    "GGML_AVX_VNNI": {"avx_vnni"},
    "GGML_AVX2": {"avx2"},
    "GGML_BMI2": {"bmi2"},
    "GGML_FMA": {"fma"},
    "GGML_F16C": {"f16c"},
    "GGML_AVX512": {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"},
    "GGML_AVX512_VBMI": {"avx512vbmi"},
    "GGML_AVX512_VNNI": {"avx512_vnni"},
    "GGML_AVX512_BF16": {"avx512_bf16"},
}
_AMX = {
    "GGML_AMX_TILE": {"amx_tile"},
    "GGML_AMX_INT8": {"amx_tile", "amx_int8"},
    "GGML_AMX_BF16": {"amx_tile", "amx_bf16"},
}
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_CCACHE": "OFF",
    # Neither downloads nor a server.
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}
_BENCH, _QUANTIZE = "llama-bench", "llama-quantize"
_RECORD = "build.json"


def read_instructions() -> set[str]:
    """
    Read what the processor can do.

    :return: Its flags as Linux calls them; nothing where they are not told.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def choose_options(instructions: Collection[str]) -> dict[str, dict[str, str]]:
    """
    Choose what llama.cpp is built with.

    Where there is AMX, it is built with and without: which one is faster depends on the model and on what it does.

    :param instructions: The processor's flags; without any, llama.cpp looks by itself.
    :return: Options of CMake by the build's name.
    """
    if not instructions:
        return {"native": _OPTIONS | {"GGML_NATIVE": "ON"}}

    def switch(options: Mapping[str, set[str]]) -> dict[str, str]:
        return {name: "ON" if needed <= set(instructions) else "OFF" for name, needed in options.items()}

    plain = _OPTIONS | {"GGML_NATIVE": "OFF"} | switch(_INSTRUCTIONS)
    with_tiles = switch(_AMX)
    builds = {"plain": plain | dict.fromkeys(_AMX, "OFF")}
    if with_tiles["GGML_AMX_INT8"] == "ON" and plain["GGML_AVX512"] == "ON":
        builds["AMX"] = plain | with_tiles
    return builds


def build_tools() -> dict[str, Path]:
    """
    Build llama-bench and llama-quantize, unless the cache has them.

    :return: A folder with the programs for each build that the compiler was able to make.
    :raises ActsparseError: If the source cannot be fetched, or a tool is missing or fails.
    """
    builds = choose_options(read_instructions())
    target = cache_dir() / f"llama.cpp-{VERSION}"
    # Another processor, another build.
    if read_json(target / _RECORD) != builds:
        shutil.rmtree(target, ignore_errors=True)
        with partial_folder() as folder:
            _build(_fetch_source(folder), builds, folder)
            (folder / "finished").rename(target)
    return {name: target / name for name in builds if (target / name).is_dir()}


def keep_running(tools: Mapping[str, Path], model: Path, threads: int) -> dict[str, Path]:
    """
    Try every build: some machines have instructions that they do not let programs use.

    :param tools: Builds of llama.cpp.
    :param model: A GGUF file.
    :param threads: How many threads compute.
    :return: Those that run.
    :raises ActsparseError: If none does.
    """
    running, last = {}, None
    for name, folder in tools.items():
        try:
            time_llama(folder, model, threads=threads, repetitions=1, prompt=64)
            running[name] = folder
        except ActsparseError as error:
            announce(f"llama.cpp is left out with {name}: {error}")
            last = error
    if last is not None and not running:
        raise last
    return running


def quantize(source: Path, kind: str, tools: Path) -> Path:
    """
    Quantise a GGUF file once more, unless the cache has it.

    :param source: The GGUF file, of any type.
    :param kind: A type of llama.cpp's, such as Q8_0.
    :param tools: A folder of `build_tools`.
    :return: The GGUF file of that type.
    :raises ActsparseError: If llama-quantize fails.
    """
    status = source.stat()
    target = cache_dir() / "gguf" / f"{source.stem}-{status.st_size}-{kind}.gguf"
    if not target.is_file():
        announce(f"making {kind} of {source.name}")
        target.parent.mkdir(exist_ok=True)
        with partial_folder() as folder:
            run_tool([str(tools / _QUANTIZE), "--allow-requantize", str(source), str(folder / "made"), kind])
            (folder / "made").replace(target)
    return target


def time_llama(
    tools: Path, model: Path, *, threads: int, repetitions: int, prompt: int, tokens: int = 0
) -> list[float]:
    """
    Read a prompt or decode tokens with llama-bench, in a process of its own.

    :param tools: A folder of `build_tools`.
    :param model: A GGUF file.
    :param threads: How many threads compute.
    :param repetitions: How often.
    :param prompt: How long the prompt is; or before the tokens that are decoded.
    :param tokens: How many tokens are decoded after it; 0 times the prompt.
    :return: Milliseconds of every repetition: for a token, or for the whole prompt.
    :raises ActsparseError: If it fails.
    """
    task = ["-p", "0", "-n", str(tokens), "-d", str(prompt)] if tokens else ["-p", str(prompt), "-n", "0"]
    options = ["-m", str(model), "-t", str(threads), "-r", str(repetitions), "-o", "json"]
    return parse_bench(run_tool([str(tools / _BENCH), *options, *task]))


def parse_bench(output: str) -> list[float]:
    """
    Read what llama-bench writes as JSON for one test.

    :param output: Its standard output.
    :return: Milliseconds of every repetition: for a token, or for the whole prompt.
    :raises ActsparseError: If it is something else.
    """
    try:
        (test,) = json.loads(output)
        steps = int(test["n_gen"]) or 1
        times = [float(sample) / 1e6 / steps for sample in test["samples_ns"]]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"llama-bench wrote something else than one test: {' '.join(output.split())[:200]!r}"
        raise ActsparseError(msg) from error
    if not times or not all(0 < time < float("inf") for time in times):
        msg = f"llama-bench measured no times: {times}"
        raise ActsparseError(msg)
    return times


def run_tool(command: list[str], folder: Path | None = None) -> str:
    """
    Run a program.

    :param command: The program and its arguments.
    :param folder: Where it runs, if not here.
    :return: Its standard output.
    :raises ActsparseError: If it is missing or fails; the message has its last word.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        msg = f"{name} does not run: {error.strerror or error}"
        raise ActsparseError(msg) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        msg = f"{name} failed with exit code {done.returncode}: {lines[-1] if lines else 'it says nothing'}"
        raise ActsparseError(msg)
    return done.stdout


def _fetch_source(folder: Path) -> Path:
    announce(f"fetching llama.cpp's source ({_PACKAGE}, 77 MB)")
    # pip compares the checksum before it looks into the file.
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--no-binary=llama-cpp-python", "--require-hashes", f"--dest={folder}", f"-r{wanted}"]
    run_tool(command)
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        msg = f"pip brought {len(archives)} archives of {_PACKAGE} instead of one"
        raise SourceError(msg)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.glob("*/vendor/llama.cpp")
    return source


def _build(source: Path, builds: Mapping[str, Mapping[str, str]], folder: Path) -> None:
    """Make `folder`/finished. All builds share one folder of objects: they differ in few of them."""
    if shutil.which("cmake") is None:
        msg = "building llama.cpp takes cmake: apt install cmake, or pip install cmake"
        raise ActsparseError(msg)
    objects, finished = folder / "objects", folder / "finished"
    for name, options in builds.items():
        announce(f"building llama.cpp, {name} (minutes, once)")
        switches = [f"-D{option}={value}" for option, value in options.items()]
        jobs = str(count_cores())
        try:
            run_tool(["cmake", "-S", str(source), "-B", str(objects), *switches])
            run_tool(["cmake", "--build", str(objects), "--parallel", jobs, "--target", _BENCH, _QUANTIZE])
        except ActsparseError as error:
            if not finished.exists():
                raise
            # A compiler may be older than the processor.
            announce(f"llama.cpp is left out with {name}: {error}")
            continue
        (finished / name).mkdir(parents=True)
        for program in (_BENCH, _QUANTIZE):
            shutil.copy2(objects / "bin" / program, finished / name / program)
    (finished / _RECORD).write_text(json.dumps(builds))


def describe_builds(names: Collection[str]) -> dict[str, Any]:
    """
    Say what llama.cpp is built with, for a report.

    :param names: The builds that run.
    :return: The package, the options that are on for each build, and which builds do not run here.
    """
    builds = choose_options(read_instructions())
    on = {name: [option for option, value in builds[name].items() if value == "ON"] for name in names}
    return {"package": _PACKAGE, "on": on, "left out": [name for name in builds if name not in names]}

"""llama.cpp beside OpenVINO: its options and its output, and which figures are judged by which bars."""

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actsparse.errors import ActsparseError
from actsparse.texts import load_pages

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("peers", "llama_cpp", "decode_speed", "bars", "command", "real_models", "workload")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("peers")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def llama_cpp(peers: Any) -> Any:
    return peers.llama_cpp


ALL_AVX512 = {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}


def find_on(options: dict[str, str]) -> set[str]:
    return {name.removeprefix("GGML_") for name, value in options.items() if value == "ON"}


def test_llama_cpp_is_built_with_what_the_processor_has(llama_cpp: Any) -> None:
    builds = llama_cpp.choose_options({"avx", "avx2", "fma", "f16c", "sse4_2", "bmi2", "avx512f"})
    assert builds.keys() == {"plain"}
    # Half of AVX-512 is none.
    assert find_on(builds["plain"]) == {"AVX", "AVX2", "FMA", "F16C", "SSE42", "BMI2"}
    assert builds["plain"]["GGML_NATIVE"] == "OFF"
    builds = llama_cpp.choose_options(ALL_AVX512 | {"avx512_vnni", "avx512vbmi", "amx_tile", "amx_int8"})
    assert find_on(builds["plain"]) == {"AVX512", "AVX512_VNNI", "AVX512_VBMI"}
    assert find_on(builds["AMX"]) == find_on(builds["plain"]) | {"AMX_TILE", "AMX_INT8"}
    # Both in one folder, one after the other: each says all that it is made of.
    assert builds["AMX"].keys() == builds["plain"].keys()
    assert llama_cpp.choose_options(set()).keys() == {"native"}


def write_test(**changes: Any) -> str:
    test = {
        "n_prompt": 0,
        "n_gen": 4,
        "samples_ns": [8_000_000, 10_000_000],
    }
    return json.dumps([test | changes])


def test_times_are_read_for_a_token_and_for_a_whole_prompt(llama_cpp: Any) -> None:
    assert llama_cpp.parse_bench(write_test()) == [2.0, 2.5]
    assert llama_cpp.parse_bench(write_test(n_prompt=128, n_gen=0)) == [8.0, 10.0]


@pytest.mark.parametrize(
    "output",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        "[1]",
        write_test(samples_ns=None),
        write_test(samples_ns=[]),
        write_test(samples_ns=[0]),
    ],
)
def test_other_output_is_refused_in_one_line(llama_cpp: Any, output: str) -> None:
    with pytest.raises(ActsparseError, match="llama-bench") as caught:
        llama_cpp.parse_bench(output)
    assert "\n" not in str(caught.value)


def test_a_program_that_fails_or_is_missing_is_one_line(llama_cpp: Any) -> None:
    with pytest.raises(ActsparseError, match="^no-such-program does not run: No such file"):
        llama_cpp.run_tool(["no-such-program"])
    program = "import sys; print('first', file=sys.stderr); sys.exit('last')"
    with pytest.raises(ActsparseError, match="failed with exit code 1: last$"):
        llama_cpp.run_tool([sys.executable, "-c", program])


def make_tools(folder: Path, script: str) -> Path:
    """Programs that write down their arguments, and then do what the script says."""
    for name in ("llama-bench", "llama-quantize"):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
        (folder / name).chmod(0o755)
    return folder


def test_a_model_is_quantised_once(llama_cpp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "cache"))
    tools = make_tools(tmp_path, 'echo made > "$3"')
    source = tmp_path / "model.gguf"
    source.write_text("x")
    (tmp_path / "cache").mkdir()
    made = [llama_cpp.quantize(source, "Q8_0", tools) for _ in range(2)]
    assert made[0] == made[1]
    assert made[0].read_text() == "made\n"
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith(f"--allow-requantize {source} ")
    assert call.endswith(" Q8_0")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["gguf"]


def test_llama_bench_decodes_after_a_context_and_reads_prompts_without_one(llama_cpp: Any, tmp_path: Path) -> None:
    tools = make_tools(tmp_path, f"echo '{write_test()}'")
    model = tmp_path / "model.gguf"
    llama_cpp.time_llama(tools, model, threads=2, repetitions=3, prompt=64, tokens=24)
    llama_cpp.time_llama(tools, model, threads=2, repetitions=3, prompt=128)
    options = f"-m {model} -t 2 -r 3 -o json"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"{options} -p 0 -n 24 -d 64",
        f"{options} -p 128 -n 0",
    ]


def test_a_build_that_does_not_run_is_left_out(llama_cpp: Any, tmp_path: Path) -> None:
    for name, script in (("plain", f"echo '{write_test()}'"), ("AMX", "kill -ILL $$")):
        (tmp_path / name).mkdir()
        make_tools(tmp_path / name, script)
    tools = {name: tmp_path / name for name in ("plain", "AMX")}
    assert llama_cpp.keep_running(tools, tmp_path / "model.gguf", 2).keys() == {"plain"}
    with pytest.raises(ActsparseError, match="llama-bench failed with exit code -4"):
        llama_cpp.keep_running({"AMX": tools["AMX"]}, tmp_path / "model.gguf", 2)


def make_round(llama: float, dense: float, sparse: float) -> dict[str, dict[str, float]]:
    decode = {
        "llama.cpp/plain": llama,
        "llama.cpp/AMX": llama + 1,
        "OpenVINO dense/f32": dense + 1,
        "OpenVINO dense/bf16": dense,
        **{f"accelerated {share}%/f32": sparse for share in (30, 40, 50)},
    }
    return {name: {"decode": time, "prompt": 10 * time} for name, time in decode.items()}


CASE = {
    "sparsities": {f"accelerated {share}%": share / 100 for share in (30, 40, 50)},
    "rounds": [make_round(*times) for times in ((20, 18, 10), (20, 17, 10), (90, 90, 90))],
}


def test_each_contender_counts_with_its_best_median_over_rounds(peers: Any) -> None:
    best = peers.sum_up(CASE["rounds"])
    assert best["llama.cpp"]["decode"] == (20, "plain")
    assert best["OpenVINO dense"] == {"decode": (18, "bf16"), "prompt": (180, "bf16")}
    assert best["accelerated 50%"]["decode"] == (10, "f32")


def test_bars_stand_at_half_sparsity_alone(peers: Any) -> None:
    bars = {bar.name: bar for bar in peers.make_bars("qwen", "int8", CASE)}
    over_dense = bars["Qwen2.5-Coder-0.5B INT8, 50%: decoding over OpenVINO dense"]
    over_llama = bars["Qwen2.5-Coder-0.5B INT8, 50%: decoding over llama.cpp Q8_0"]
    assert (over_dense.measured, over_dense.limit, over_dense.is_met) == (1.8, 1.7, True)
    assert (over_llama.measured, over_llama.limit, over_llama.is_met) == (2.0, 1.8, True)
    assert [bar.limit for bar in bars.values() if bar.limit is not None] == [1.7, 1.8]
    assert bars["Qwen2.5-Coder-0.5B INT8: llama.cpp Q8_0, a token"].measured == 20
    assert "50.0% measured" in over_dense.note
    limits = [[bar.limit for bar in peers.make_bars("default", kind, CASE) if bar.limit] for kind in ("int8", "int4")]
    assert limits == [[1.7], []]


def test_a_model_that_cannot_be_had_is_left_out_and_none_at_all_is_a_mistake(
    peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Path:
        msg = "it is not here"
        raise ActsparseError(msg)

    monkeypatch.setattr(peers.llama_cpp, "build_tools", lambda: {"plain": tmp_path})
    monkeypatch.setattr(peers.llama_cpp, "quantize", lambda *arguments: tmp_path)
    monkeypatch.setattr(peers.llama_cpp, "keep_running", lambda tools, *others: tools)
    monkeypatch.setattr(peers, "fetch_model", lambda: tmp_path)
    monkeypatch.setattr(peers.llama_cpp, "describe_builds", lambda names: list(names))
    monkeypatch.setattr(peers, "SOURCES", {"default": lambda: tmp_path, "qwen": fail})
    monkeypatch.setattr(peers, "run_case", lambda *arguments: CASE)
    result = tmp_path / "result.json"
    assert peers.main(["--json", str(result)]) == 0
    report = json.loads(result.read_text(encoding="utf-8"))
    assert report["settings"]["left out"] == {"qwen": "it is not here"}
    assert report["samples"].keys() == {"default-int8", "default-int4"}
    assert peers.main(["--models", "qwen"]) == 2
    assert "no model can be had: it is not here" in capsys.readouterr().err
    for arguments in (["--models", "gemma"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as stop:
            peers.main(arguments)
        assert stop.value.code == 2


def test_decoding_is_judged_by_sparsity_batch_prompt_and_memory(peers: Any) -> None:
    del peers
    decode_speed = importlib.import_module("decode_speed")
    side = {"decode_ms": {"median": 10.0}, "share_of_read_bandwidth": 0.5, "peak_rss_mb": 100.0}
    point = {"measured_sparsity": 0.5, "decode_speedup": 1.9, "dense": side, "sparse": side}
    lengths = decode_speed.PROMPT_LENGTHS.split(",")
    result = {
        "points": [point],
        "batch_speedup": {"2": 1.4, "4": 1.2, "8": 1.2, "16": 1.1, "32": 1.0},
        "ttft_ratio": dict.fromkeys(lengths, 1.0),
        **point,
    }
    bars = {bar.name: bar for bar in decode_speed.make_bars("1b, all 50%", result)}
    missed = [name for name, bar in bars.items() if not bar.is_met]
    assert missed == ["1b, all 50%: 4 sequences, speed-up"]
    assert len(bars) == 1 + 5 + 8 + 1
    for case in decode_speed.CASES.values():
        sparsities = case.arguments[case.arguments.index("--sparsity") + 1] if "--sparsity" in case.arguments else "0.5"
        assert len(sparsities.split(",")) == len(case.speedups)
        assert case.command[-4::2] == ("--batch-sizes", "--prompt-lengths")


def test_rounds_are_kept_and_the_next_run_goes_on_with_them(
    peers: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    del own_cache
    monkeypatch.setattr(peers, "SOURCES", {"qwen": lambda: files / "model"})
    monkeypatch.setattr(peers.llama_cpp, "quantize", lambda *arguments: tmp_path / "model.gguf")
    monkeypatch.setattr(peers.llama_cpp, "time_llama", lambda *arguments, **options: [2.0, 3.0, 4.0])
    texts = {"evaluation": files / "evaluation.txt", "calibration": files / "calibration.txt"}
    monkeypatch.setattr(peers, "load_pages", lambda name, purpose="evaluation": load_pages(texts[purpose]))
    tools = {"plain": tmp_path}
    options = Namespace(rounds=1, folder=tmp_path)
    first = peers.run_case("qwen", "int8", tools, options)
    assert first["rounds"][0]["llama.cpp/plain"] == {"decode": 3.0, "prompt": 3.0}
    assert {name.partition("/")[0] for name in first["rounds"][0]} == {
        "llama.cpp", "OpenVINO dense", "accelerated 30%", "accelerated 40%", "accelerated 50%"
    }  # fmt: skip
    assert first["sparsities"]["accelerated 50%"] == pytest.approx(0.5, abs=0.1)
    second = peers.run_case("qwen", "int8", tools, Namespace(rounds=2, folder=tmp_path))
    assert second["rounds"][0] == first["rounds"][0]
    assert len(second["rounds"]) == 2
    monkeypatch.setattr(peers, "prepare_dense", pytest.fail)
    assert peers.run_case("qwen", "int8", tools, options) == second
    assert len(peers.make_bars("qwen", "int8", second)) == 5 + 6


CMAKE = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
objects = pathlib.Path(arguments[arguments.index("-B" if "-B" in arguments else "--build") + 1])
(objects / "bin").mkdir(parents=True, exist_ok=True)
if "-DGGML_AMX_INT8=ON" in arguments:
    sys.exit("unknown option -mamx-int8")
for name in ("llama-bench", "llama-quantize"):
    (objects / "bin" / name).write_text("a program")
"""


def test_programs_are_built_once_and_without_what_the_compiler_does_not_know(
    llama_cpp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    instructions = ALL_AVX512 | {"amx_tile", "amx_int8"}
    monkeypatch.setattr(llama_cpp, "read_instructions", lambda: instructions)
    fetched: list[Path] = []
    monkeypatch.setattr(llama_cpp, "_fetch_source", lambda folder: fetched.append(folder) or folder / "source")
    with pytest.raises(ActsparseError, match="takes cmake"):
        llama_cpp.build_tools()
    (tmp_path / "cmake").write_text(CMAKE.format(python=sys.executable))
    (tmp_path / "cmake").chmod(0o755)
    tools = [llama_cpp.build_tools() for _ in range(2)]
    assert tools[0] == tools[1]
    assert tools[0].keys() == {"plain"}
    assert (tools[0]["plain"] / "llama-bench").read_text() == "a program"
    assert "left out with AMX: cmake failed with exit code 1: unknown option -mamx-int8" in capsys.readouterr().err
    assert len(fetched) == 2
    instructions.discard("amx_int8")
    assert llama_cpp.build_tools().keys() == {"plain"}
    assert len(fetched) == 3, "another processor, another build"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"llama.cpp-{llama_cpp.VERSION}"]

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actsparse import ActsparseError, sparsify_activations
from actsparse.errors import OutputError, SourceError
from actsparse.openvino import deploy_model, export_model, extension_path, load_causal_lm
from actsparse.openvino.acceleration import is_accelerated
from actsparse.openvino.deploy import needs_extension
from actsparse.openvino.export import MODEL_FILE
from actsparse.openvino.runner import EXACT
from actsparse.openvino.toolchain import find_compiler, find_openvino, run_command
from actsparse.torch.compression import compress_int8

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "generate.cc"
PROMPT = [1, 5, 9, 13]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folders(make_model: Any, make_batches: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one masked INT8 model portable, accelerated and accelerated exactly."""
    root = tmp_path_factory.mktemp("deployed")
    batches = make_batches()
    model = sparsify_activations(compress_int8(make_model("llama"), "asym", batches[0]), batches, 0.5)
    export_model(model, root / "portable")
    deploy_model(model, root / "default")
    report = deploy_model(model, root / "exact", exact=True)
    assert len(report.masked) == 6
    assert [site.operation for site in report.accelerated if not site.is_masked] == ["SparseHead"]
    assert not report.kept
    return {name: root / name for name in ("portable", "default", "exact")}


def generate(folder: Path, ov_config: dict[str, str] = EXACT) -> list[int]:
    model = load_causal_lm(folder, ov_config=ov_config)
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(torch.tensor([PROMPT]), **limits, do_sample=False)[0].tolist()


def test_the_exact_model_generates_the_tokens_of_the_portable_graph(folders: dict[str, Path]) -> None:
    assert generate(folders["exact"]) == generate(folders["portable"])


def test_a_deployed_folder_holds_one_complete_model(folders: dict[str, Path]) -> None:
    assert needs_extension(folders["default"] / MODEL_FILE)
    assert not needs_extension(folders["portable"] / MODEL_FILE)
    names = {path.name for path in folders["default"].iterdir()}
    assert {MODEL_FILE, "openvino_model.bin", "config.json"} <= names
    assert {path.name for path in folders["portable"].iterdir()} == names


def test_a_tokenizer_that_nobody_gave_is_not_made_up(make_model: Any, tmp_path: Path, files: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    deploy_model(model, tmp_path / "without")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == {"config.json", "generation_config.json", MODEL_FILE, "openvino_model.bin"}
    deploy_model(model, tmp_path / "with", AutoTokenizer.from_pretrained(files / "model"))
    assert (tmp_path / "with" / "tokenizer.json").is_file()


def test_a_new_process_needs_nothing_but_the_extension(folders: dict[str, Path], make_batches: Any) -> None:
    script = (
        "import sys, openvino as ov; core = ov.Core(); core.add_extension(sys.argv[1]); "
        "core.compile_model(sys.argv[2], 'CPU'); assert 'actsparse' not in sys.modules"
    )
    arguments = [str(extension_path()), str(folders["default"] / MODEL_FILE)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_c_plus_plus_program_generates_the_same_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    package = find_openvino()
    program = tmp_path / "generate"
    libraries = [str(package.libraries[0]), f"-Wl,-rpath,{package.libraries[0].parent}"]
    command = [*find_compiler().command, "-std=c++17", f"-I{package.include}", str(EXAMPLE), "-o", str(program)]
    built = run_command([*command, *libraries])
    assert built.returncode == 0, built.stdout
    model = str(folders["default"] / MODEL_FILE)
    done = run_command([str(program), model, str(extension_path()), str(NEW_TOKENS), *map(str, PROMPT)])
    assert done.returncode == 0, done.stdout
    # Both run with OpenVINO's own settings.
    expected = generate(folders["default"], ov_config={"PERFORMANCE_HINT": "LATENCY"})
    assert [*PROMPT, *map(int, done.stdout.split())] == expected
    without = run_command([str(program), model, "/no/such/library.so", "1", "1"])
    assert without.returncode == 1
    assert "error: " in without.stdout


def test_reloading_and_unloading_leave_no_trace(folders: dict[str, Path]) -> None:
    first = generate(folders["exact"])
    for _ in range(3):
        assert generate(folders["exact"]) == first


def test_an_accelerated_model_has_no_masks_to_accelerate_again(folders: dict[str, Path]) -> None:
    model = load_causal_lm(folders["default"], compile=False)
    assert is_accelerated(model.model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=MODEL_FILE):
        load_causal_lm(tmp_path)


def test_a_damaged_model_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    for path in folders["default"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / MODEL_FILE).read_text()
    (tmp_path / MODEL_FILE).write_text(text.replace('weight_type="u8"', 'weight_type="u3"'))
    with pytest.raises(ActsparseError, match="cannot be loaded") as caught:
        load_causal_lm(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_refused(make_model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        deploy_model(make_model("llama"), tmp_path / "file" / "folder")


def test_many_tokens_leave_memory_as_it_was(folders: dict[str, Path]) -> None:
    core = ov.Core()
    core.add_extension(str(extension_path()))
    request = core.compile_model(folders["default"] / MODEL_FILE, "CPU", EXACT).create_infer_request()

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    def decode(tokens: int) -> None:
        request.reset_state()
        for past in range(tokens):
            request.infer(
                {
                    "input_ids": np.array([[past % 60]]),
                    "attention_mask": np.ones((1, past + 1), np.int64),
                    "position_ids": np.array([[past]]),
                    "beam_idx": np.zeros(1, np.int32),
                }
            )

    if not Path("/proc/self/statm").is_file():
        pytest.skip("no /proc here")
    decode(2000)
    before = resident()
    decode(2000)
    assert (resident() - before) * 4096 < 16e6

"""Find out whether acceleration works on this machine, and what to do where it does not."""

import ctypes
import os
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from openvino.utils.node_factory import NodeFactory
from rich.markup import escape
from rich.table import Table

from actsparse.openvino.build import BuildState, describe_build, extension_path
from actsparse.openvino.packing import pack_site
from actsparse.openvino.toolchain import BuildError
from actsparse.openvino.weights import Weights
from actsparse.runtime.environment import count_cores

LIBRARIES = ("openvino", "nncf", "torch", "transformers")
OPTIONAL_LIBRARIES = ("optimum-intel", "openvino-tokenizers", "openvino-genai")
# The second is loaded into the first, which takes exactly its own release.
MATCHING_LIBRARIES = ("openvino-tokenizers", "openvino-genai")

KERNELS = {
    "amx": "AMX with INT8, AVX-512 with VNNI",
    "avx512": "AVX-512 with VNNI",
    "avx2": "AVX2",
    "i8mm": "ARM NEON with matrix products of INT8 (I8MM)",
    "neon": "ARM NEON with dot products of INT8",
    "portable": "portable C++",
}

# The exact mode is as exact as f32.
MAX_ERROR = 1e-5

MARKS = {True: "[green]✓[/]", False: "[red]✗[/]", None: ""}


@dataclass(frozen=True)
class Finding:
    """
    One thing that was looked at.

    :param is_fine: Whether it is as it should be; None if it is neither good nor bad.
    """

    name: str
    value: str
    is_fine: bool | None = None
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    is_accelerated: bool
    findings: tuple[Finding, ...]

    def to_table(self) -> Table:
        """Draw the diagnosis for a terminal."""
        verdict = (
            "acceleration works" if self.is_accelerated else "acceleration does not work: masked models stay dense"
        )
        table = Table("", "", "", title="actsparse doctor", caption=verdict, show_header=False)
        for finding in self.findings:
            value = escape(finding.value) + (f"\n[yellow]→ {escape(finding.advice)}[/]" if finding.advice else "")
            table.add_row(MARKS[finding.is_fine], finding.name, value)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Turn the diagnosis into what JSON can hold."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine, build the extension if there is none yet, and try it."""
    machine = (
        Finding("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        Finding("platform", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        _examine_processor(),
        Finding("cores", f"{count_cores()} of {os.cpu_count()} usable"),
        Finding("threads", _describe_threads()),
        Finding("memory", _describe_memory()),
    )
    libraries = tuple(_examine_library(name) for name in (*LIBRARIES, *OPTIONAL_LIBRARIES))
    try:
        library = extension_path()
    except BuildError as error:
        state = describe_build()
        advice = "" if state.obstacle else str(error)
        findings = (*machine, *libraries, *_examine_build(state), Finding("self-test", "not run", False, advice))
        return Diagnosis(False, findings)
    test = try_extension(library)
    findings = (*machine, *libraries, *_examine_build(describe_build()), _examine_kernels(library), test)
    return Diagnosis(bool(test.is_fine), findings)


def try_extension(library: Path) -> Finding:
    """Multiply with a small SparseLinear in OpenVINO and compare with numpy."""
    generator = np.random.default_rng(0)
    weights = Weights(
        "u8",
        generator.integers(0, 256, (128, 64), np.uint8),
        generator.uniform(0.01, 0.02, (128, 1)).astype(np.float32),
        generator.integers(100, 150, (128, 1)).astype(np.float32),
    )
    x = generator.standard_normal((3, 64), np.float32)
    threshold = generator.uniform(0, 1, 64).astype(np.float32)
    try:
        computed = _run_extension(library, weights, x, threshold)
    except RuntimeError as failure:
        advice = "OpenVINO refuses the extension; please report this with the output of actsparse doctor --json"
        return Finding("self-test", f"fails: {' '.join(str(failure).split())[:200]}", False, advice)
    masked = np.where(np.abs(x) <= threshold, 0, x).astype(np.float64)
    assert weights.scale is not None and weights.zero is not None
    expected = masked @ ((weights.values - weights.zero.astype(np.float64)) * weights.scale).T
    error = float(np.abs(computed - expected).max() / np.abs(expected).max())
    if not error <= MAX_ERROR:  # NaN too
        advice = "the kernels compute nonsense here: set ACTSPARSE_ISA=portable, and please report this"
        return Finding("self-test", f"fails: relative error {error:.1e}", False, advice)
    return Finding("self-test", f"passes (relative error {error:.0e})", True)


def _run_extension(library: Path, weights: Weights, x: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    factory = NodeFactory()
    factory.add_extension(str(library))
    packed = pack_site([weights], threshold)
    parameter = ops.parameter([-1, x.shape[1]], ov.Type.f32)
    attributes = {**packed.attributes(), "is_exact": True}
    node = factory.create("SparseLinear", [parameter.output(0), ops.constant(packed.data).output(0)], attributes)
    # openvino's own stub of this constructor contradicts itself.
    model = ov.Model([node.output(0)], [parameter], "self-test")  # pyright: ignore[reportGeneralTypeIssues]
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0]


def _examine_build(state: BuildState) -> tuple[Finding, ...]:
    obstacle = state.obstacle or ""
    headers = Finding("OpenVINO to build with", state.openvino or "none", bool(state.openvino))
    compiler = Finding("compiler", state.compiler or "none", bool(state.compiler))
    if state.openvino is None:
        headers = replace(headers, advice=obstacle)
    elif state.compiler is None:
        compiler = replace(compiler, advice=obstacle)
    if state.library is None or state.root is None:
        return headers, compiler, Finding("extension", state.state, False)
    place = state.library.relative_to(state.root)
    age = "" if state.age is None else f", built {_describe_age(state.age)} ago"
    return headers, compiler, Finding("extension", f"{state.state}: {place}{age}", state.state == "ready")


def _examine_kernels(library: Path) -> Finding:
    get_name = ctypes.CDLL(str(library)).actsparse_kernels
    get_name.restype = ctypes.c_char_p
    name = get_name().decode()
    chosen = os.environ.get("ACTSPARSE_ISA")
    advice = "neither AVX2 nor ARM's dot products here: masked models gain little" if name == "portable" else ""
    if chosen:
        advice = f"the environment variable ACTSPARSE_ISA asks for {chosen}; unset it for the best this processor has"
    return Finding("instructions", KERNELS.get(name, name), None if advice else True, advice)


def _examine_processor() -> Finding:
    try:
        core = ov.Core()
        name = str(core.get_property("CPU", "FULL_DEVICE_NAME"))
        capabilities = cast("list[str]", core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    except RuntimeError:
        return Finding("processor", "unknown to OpenVINO", False, "OpenVINO's CPU plugin does not load; reinstall it")
    types = sorted({"BF16", "FP16", "FP32", "INT8"} & set(capabilities))
    return Finding("processor", f"{name.strip()} ({', '.join(types)} in OpenVINO)")


def _examine_library(name: str) -> Finding:
    install = "pip install 'actsparse[openvino]'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "missing", None if name in OPTIONAL_LIBRARIES else False, install)
    release = version("openvino").split(".")[:3]
    if name in MATCHING_LIBRARIES and found.split(".")[:3] != release:
        return Finding(name, found, False, f"it does not match openvino {'.'.join(release)}: {install} --upgrade")
    return Finding(name, found, True)


def _describe_threads() -> str:
    asked = int(str(ov.Core().get_property("CPU", "INFERENCE_NUM_THREADS")))
    texts = [f"OpenVINO (TBB) {asked or 'by itself'}", f"torch (OpenMP) {torch.get_num_threads()}"]
    texts += [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "TBB_NUM_THREADS") if name in os.environ]
    return ", ".join(texts)


def _describe_memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    except (AttributeError, OSError, ValueError):
        return "unknown"


def _describe_age(seconds: float) -> str:
    for name, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{max(seconds, 0):.0f} seconds"

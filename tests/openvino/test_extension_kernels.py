"""The extension's kernels, without OpenVINO, under the address and undefined behaviour sanitizers."""

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from actsparse.openvino.build import SOURCES
from actsparse.openvino.toolchain import BuildError, find_compiler

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent / "extension"
# They need OpenVINO's headers.
OPENVINO_SOURCES = {"operations.cc", "site_bytes.cc", "extension.cc"}
OVERFLOW = TESTS / "overflow.cc"

COMMON_FLAGS = ["-std=c++17", "-g1", "-pthread", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
COMMON_FLAGS += [f"-I{SOURCES}", f"-I{TESTS}"]
# Vectors in whose spare capacity nobody may read or write.
FLAGS = [*COMMON_FLAGS, "-O1", "-fsanitize=address,undefined", "-D_GLIBCXX_SANITIZE_VECTOR"]

ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Emulators do not take the address sanitizer.
ARM_FLAGS = [*COMMON_FLAGS, "-O2", "-fsanitize=undefined"]
# What the undefined behaviour sanitizer's library asks for once it is linked statically.
ARM_LIBRARIES = ["-static", "-lubsan", "-lstdc++"]
# What processors have: neither instruction, dot products, and matrix products too.
ARM_KERNELS = {
    "cortex-a53": ["portable"],
    "cortex-a76": ["neon", "portable"],
    "max": ["i8mm", "neon", "portable"],
}

# The leak check does not work in every container, and is not what is tested.
ASAN_OPTIONS = "detect_leaks=0"


@dataclass(frozen=True)
class Toolchain:
    """A compiler whose sanitizers work, and what it has made."""

    command: tuple[str, ...]
    folder: Path
    libraries: tuple[str, ...] = ()

    def build(self, *sources: Path) -> Path:
        """Compile and link sources, or return the program that an earlier run of the tests made of the same ones."""
        read = sorted({*sources, *SOURCES.glob("*.hpp"), *TESTS.glob("*.hpp")})
        digest = hashlib.sha256(repr((self.command, self.libraries)).encode())
        for path in read:
            digest.update(path.read_bytes())
        program = self.folder / digest.hexdigest()[:16]
        if program.exists():
            return program
        with tempfile.TemporaryDirectory(dir=self.folder) as name, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [Path(name) / f"{source.name}.o" for source in sources]
            commands = [["-c", str(source), "-o", str(to)] for source, to in zip(sources, objects, strict=True)]
            list(pool.map(self._run, commands))
            made = Path(name) / "program"
            self._run([*map(str, objects), *self.libraries, "-o", str(made)])
            made.replace(program)
        return program

    def _run(self, arguments: list[str]) -> None:
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"ASAN_OPTIONS": ASAN_OPTIONS} | environment
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, env=variables)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are kept: compiling takes longer than running."""
    if request.config.pluginmanager.has_plugin("cacheprovider"):
        with contextlib.suppress(OSError):
            return request.config.cache.mkdir("kernels")
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def toolchain(folder: Path) -> Toolchain:
    try:
        command = (*find_compiler().command, *FLAGS)
    except BuildError as error:
        pytest.skip(str(error))
    trial = folder / "trial.cc"
    trial.write_text("int main() { return 0; }\n")
    done = subprocess.run([*command, str(trial), "-o", str(folder / "trial")], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the C++ compiler has no sanitizers: {done.stderr.strip().splitlines()[-1]}")
    if run(folder / "trial").returncode != 0:
        pytest.skip("programs with sanitizers do not start here")
    return Toolchain(command, folder)


def build_kernel_tests(toolchain: Toolchain) -> Path:
    kernels = [path for path in sorted(SOURCES.glob("*.cc")) if path.name not in OPENVINO_SOURCES]
    tests = [path for path in sorted(TESTS.glob("*.cc")) if path != OVERFLOW]
    return toolchain.build(*kernels, *tests)


@pytest.fixture(scope="module")
def kernel_tests(toolchain: Toolchain) -> Path:
    return build_kernel_tests(toolchain)


@pytest.fixture(scope="module")
def arm_kernel_tests(folder: Path) -> Path:
    compiler = shutil.which(ARM_COMPILER)
    if compiler is None or shutil.which(ARM_EMULATOR) is None:
        pytest.skip(f"{ARM_COMPILER} or {ARM_EMULATOR} is missing (apt install g++-aarch64-linux-gnu qemu-user)")
    return build_kernel_tests(Toolchain((compiler, *ARM_FLAGS), folder, tuple(ARM_LIBRARIES)))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [((), "heap-buffer-overflow"), (("signed",), "signed integer overflow")],
    ids=["address", "undefined"],
)
def test_a_planted_mistake_does_not_get_past_the_sanitizers(toolchain, arguments, complaint):
    done = run(toolchain.build(OVERFLOW), *arguments)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_kernels_are_right_and_clean_under_the_sanitizers(kernel_tests):
    done = run(kernel_tests)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" s\n") == 9


def test_the_environment_chooses_among_the_kernels_that_run_here(kernel_tests):
    best, *available = run(kernel_tests, "list", ACTSPARSE_ISA="").stdout.split()
    assert best == available[0]
    assert available[-1] == "portable"
    for name in available:
        assert run(kernel_tests, "list", ACTSPARSE_ISA=name).stdout.split()[0] == name
    assert run(kernel_tests, "list", ACTSPARSE_ISA="unknown").stdout.split()[0] == best


def refuse_amx() -> None:
    """Make the system answer a process's request to use AMX, arch_prctl(0x1023, ...), with EPERM, from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    load, jump_if_equal, answer = 0x20, 0x15, 0x06
    number_of_call, first_argument = 0, 16  # where they lie in seccomp_data
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    rules = [
        (load, 0, 0, number_of_call),
        (jump_if_equal, 0, 3, 158),  # arch_prctl
        (load, 0, 0, first_argument),
        (jump_if_equal, 0, 1, 0x1023),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    holder = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    for arguments in ((no_new_privileges, 1, 0, 0, 0), (set_seccomp, filter_mode, holder, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def test_without_permission_for_amx_the_next_best_kernels_run(kernel_tests):
    names = run(kernel_tests, "list", ACTSPARSE_ISA="").stdout.split()[1:]
    if "amx" not in names:
        pytest.skip("this processor has no AMX")
    variables = os.environ | {"ASAN_OPTIONS": ASAN_OPTIONS, "ACTSPARSE_ISA": ""}
    command = [str(kernel_tests), "list"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, preexec_fn=refuse_amx)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["avx512", *[name for name in names if name != "amx"]]


@pytest.mark.parametrize(("processor", "kernels"), ARM_KERNELS.items())
def test_kernels_are_right_on_arm(arm_kernel_tests, processor, kernels):
    emulator = [ARM_EMULATOR, "-cpu", processor, str(arm_kernel_tests)]
    listed = subprocess.run([*emulator, "list"], capture_output=True, text=True)
    assert listed.stdout.split() == [kernels[0], *kernels]
    done = subprocess.run([*emulator, "hurry"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" s\n") == 9

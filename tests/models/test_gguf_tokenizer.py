"""Tokenizers of GGUF files: the tokens of the tokenizer that a file was written from, or a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from actsparse.errors import SourceError
from actsparse.models import load_model
from actsparse.models.gguf_tokenizer import build_gguf_tokenizer

gguf = pytest.importorskip("gguf")

# As the models' own tokenizer.json files have them.
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "llama-bpe": [rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"],
    "qwen2": [rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"],
    "tekken": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ],
    "gpt-4o": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIXES}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIXES}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
    ],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        + SPACES,
    ],
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTE_LEVEL],
    "smollm": [DIGITS, BYTE_LEVEL],
    "command-r": [DIGITS, BYTE_LEVEL],
    **{
        name: [
            *({"type": "Split", "pattern": {"Regex": x}, "behavior": "Isolated", "invert": False} for x in patterns),
            BYTE_LEVEL | {"use_regex": False},
        ]
        for name, patterns in PATTERNS.items()
    },
}
COMPOSED = ("qwen2", "command-r")
TAKEN_WHOLE = ("llama-bpe", "tekken")

TEXT = """\
In 1984, 12345 visitors couldn't see it's price: $1,234.56 (50% off)! I'LL say "DON'T"...
def area(width, height):\n    return width * height  # naïve café\n\n\n
HTTPServer iPhone XMLHttpRequest ___ --- 日本語のテスト 中文字符 한국어 Ελληνικά кириллица
😀👩‍👩‍👧 ﬁ Å\r\n\tend   of it  """
TRICKY = [TEXT, "", " ", "\n\n x", "12345 678", "1234567", "we'Re I'LL", "a" * 40, "Å Å", "<s>in</s>", "<user>in 1"]


def train(name: str) -> Tokenizer:
    """Train a byte-level BPE that splits as the named one does."""
    blank = {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": name in TAKEN_WHOLE}
    parts = PRE_TOKENIZERS[name]
    described = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if name in COMPOSED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts},
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": blank,
    }
    tokenizer = Tokenizer.from_str(json.dumps(described))
    specials = [AddedToken("<s>", special=True, normalized=False), AddedToken("</s>", special=True, normalized=False)]
    alphabet = ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=specials)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<user>", special=False, normalized=False)])
    return tokenizer


def train_sentencepiece(*, has_prefix: bool) -> Tokenizer:
    """Train a BPE on characters that falls back on bytes, as Llama 2's and Gemma's."""
    start = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    start.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    specials: list[Any] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer: Any = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, limit_alphabet=60, max_token_length=8)
    start.train_from_iterator([TEXT.replace(" ", "▁")], trainer)
    vocabulary, merges = start.get_vocab(), [tuple(x) for x in json.loads(start.to_str())["model"]["merges"]]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = start.normalizer
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<s>", "</s>")])
    return tokenizer


def write(path: Path, tokenizer: Tokenizer, change: Callable[[Any], None] = lambda _: None, **fields: Any) -> Path:
    """
    Write a GGUF file with a tokenizer and nothing else, as llama.cpp's converter does.

    :param change: Adds fields.
    :param fields: The tokenizer's `model` and `pre`.
    """
    described = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    kinds = {"<s>": 3, "</s>": 3, "<user>": 4, "<unk>": 2} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_tokenizer_model(fields.get("model", "gpt2"))
    if "pre" in fields:
        writer.add_tokenizer_pre(fields["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, 1) for token in tokens])
    if fields.get("model") == "llama":
        # SentencePiece numbers its pieces as it finds them.
        writer.add_token_scores([-float(number) for number in range(len(tokens))])
        writer.add_unk_token_id(vocabulary["<unk>"])
    else:
        writer.add_token_merges([" ".join(merge) for merge in described["model"]["merges"]])
    writer.add_bos_token_id(vocabulary["<s>"])
    writer.add_eos_token_id(vocabulary["</s>"])
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def require_equal(built: Any, original: Tokenizer, text: str) -> None:
    ids = built(text, add_special_tokens=False)["input_ids"]
    expected: Any = original.encode(text, add_special_tokens=False)
    assert built.convert_ids_to_tokens(ids) == expected.tokens
    assert built.decode(ids) == original.decode(expected.ids, skip_special_tokens=False)


@pytest.fixture(scope="module", params=list(PRE_TOKENIZERS))
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    original = train(request.param)
    path = write(tmp_path_factory.mktemp("gguf") / "x.gguf", original, pre=request.param)
    return build_gguf_tokenizer(path, "x"), original


@pytest.fixture(scope="module", params=[True, False], ids=["Llama 2", "Gemma"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    original = train_sentencepiece(has_prefix=request.param)

    def say_prefix(writer: Any) -> None:
        if not request.param:
            writer.add_add_space_prefix(False)

    path = write(tmp_path_factory.mktemp("gguf") / "x.gguf", original, say_prefix, model="llama")
    return build_gguf_tokenizer(path, "x"), original


def test_byte_level_tokens_are_those_of_the_original(byte_level: tuple[Any, Tokenizer]) -> None:
    for text in TRICKY:
        require_equal(*byte_level, text)


def test_sentencepiece_tokens_are_those_of_the_original(sentencepiece: tuple[Any, Tokenizer]) -> None:
    for text in TRICKY:
        require_equal(*sentencepiece, text)


@given(st.text(st.sampled_from("aBé中0123 \n\r\t'sLl.,<>/😀\u0301"), max_size=30))
def test_any_text_gives_the_tokens_of_the_original(byte_level: tuple[Any, Tokenizer], text: str) -> None:
    require_equal(*byte_level, text)


def test_a_saved_tokenizer_is_loaded_as_it_was(byte_level: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    built, original = byte_level
    built.save_pretrained(tmp_path)
    require_equal(PreTrainedTokenizerFast.from_pretrained(tmp_path), original, TEXT)


@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "qwen2"}, False),
        ({"pre": "smollm"}, False),
        ({"model": "llama"}, True),
    ],
    ids=str,
)
def test_special_tokens_are_those_of_the_file(fields: dict[str, Any], begins: bool, tmp_path: Path) -> None:
    original = train_sentencepiece(has_prefix=True) if "model" in fields else train(fields["pre"])
    silent: Any = build_gguf_tokenizer(write(tmp_path / "silent.gguf", original, **fields), "x")
    assert (silent.bos_token, silent.eos_token, silent.pad_token) == ("<s>", "</s>", None)
    assert silent.model_max_length == 512
    first, last = silent.bos_token_id, silent.eos_token_id
    assert (silent("in")["input_ids"][0] == first) is begins

    def say(writer: Any) -> None:
        writer.add_add_bos_token(not begins)
        writer.add_add_eos_token(True)
        writer.add_pad_token_id(original.token_to_id("</s>"))

    said: Any = build_gguf_tokenizer(write(tmp_path / "said.gguf", original, say, **fields), "x")
    assert (said("in")["input_ids"][0] == first) is not begins
    assert said("in")["input_ids"][-1] == last
    assert said("in", "to")["input_ids"].count(last) == 2
    assert said.pad_token == "</s>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": "viking"}, "tokenizer.ggml.pre='viking'"),
        ({}, "tokenizer.ggml.pre=None"),
        ({"model": "bert"}, "tokenizer.ggml.model='bert'"),
    ],
    ids=str,
)
def test_an_unknown_tokenizer_is_refused_with_the_way_out(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", train("gpt-2"), **fields)
    with pytest.raises(SourceError, match=r"known are gpt-2, smollm, .* SentencePiece's.*--tokenizer FOLDER") as caught:
        load_model(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_part_of_a_split_file_is_told_and_how_to_join_them(tmp_path: Path) -> None:
    def split(writer: Any) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 3)

    path = write(tmp_path / "x-00002-of-00003.gguf", train("gpt-2"), split, pre="gpt-2")
    with pytest.raises(SourceError, match=r"is part 2 of 3 of a split GGUF file; join them: llama-gguf-split --merge"):
        load_model(str(path))


def test_a_given_tokenizer_is_taken(files: Path, tmp_path: Path) -> None:
    own = load_model(str(files / "model"))
    PreTrainedTokenizerFast(tokenizer_object=train("gpt-2"), bos_token="<s>").save_pretrained(tmp_path)
    given = load_model(str(files / "model"), tokenizer=str(tmp_path)).tokenizer
    assert given("in 1984")["input_ids"] != own.tokenizer("in 1984")["input_ids"]
    require_equal(given, train("gpt-2"), TEXT)
    for folder, message in ((tmp_path / "none", "there is no folder"), (files, "has no tokenizer")):
        with pytest.raises(SourceError, match=message):
            load_model(str(files / "model"), tokenizer=str(folder))

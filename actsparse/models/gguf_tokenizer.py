"""The tokenizer of a GGUF file, built from the file's own fields."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from actsparse.errors import SourceError

# GGUF's kinds of tokens that are looked for before text is split: those that text never spells, and those that it may.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# What GGUF calls the two families: byte-level BPE, and SentencePiece's BPE.
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"

# The regular expressions are those of the models' own tokenizer.json files, taken apart.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CHINESE = "[一-龥\u3040-ゟ゠-ヿ]+"


def _cased(ending: str) -> str:
    return "|".join(rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}{ending}" for a, b in (("*", "+"), ("+", "*")))


def _by(*patterns: str) -> Any:
    """Split by each pattern in turn; what is between two matches is a piece, too."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _by_words(digits: str) -> Any:
    return _by(f"{_CONTRACTIONS}|{_WORD}|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n]*|{_SPACES}")


def _by_case(ending: str, digits: str) -> Any:
    return _by(f"{_cased(ending)}|{digits}| ?[^\\s\\p{{L}}\\p{{N}}]+[\\r\\n/]*|{_SPACES}")


def _by_digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _plain()])


def _plain() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


@dataclass(frozen=True)
class _Splitting:
    """
    How text is split before merging, for one of GGUF's names of that.

    :param pre_tokenizer: Makes what splits.
    :param is_composed: Whether text is brought into Unicode's form NFC before.
    :param ignores_merges: Whether a piece that is a token is taken whole, whatever merges would make of it.
    :param begins_with_bos: Whether a BOS token goes in front where the file does not say.
    """

    pre_tokenizer: Callable[[], Any]
    is_composed: bool = False
    ignores_merges: bool = False
    begins_with_bos: bool = False


_LLAMA_3 = _Splitting(lambda: _by_words(r"\p{N}{1,3}"), ignores_merges=True, begins_with_bos=True)
_DIGITS = _Splitting(_by_digits)
_QWEN_2 = _Splitting(lambda: _by_words(r"\p{N}"), is_composed=True)
_DEEPSEEK_3 = _Splitting(
    lambda: _by(
        r"\p{N}{1,3}",
        _CHINESE,
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    )
)
_SPLITTINGS = {
    "gpt-2": _Splitting(_plain),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "command-r": _Splitting(_by_digits, is_composed=True),
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "deepseek-v3": _DEEPSEEK_3,
    "tekken": _Splitting(lambda: _by_case("", r"\p{N}"), ignores_merges=True, begins_with_bos=True),
    "gpt-4o": _Splitting(lambda: _by_case(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
}


def build_gguf_tokenizer(path: Path, name: str) -> PreTrainedTokenizerBase:
    """
    Build a tokenizer.

    transformers 5.5 converts all of an architecture alike, Llama 3's byte-level BPE as if it were Llama 2's
    SentencePiece: digits are not split, BOS is taken for EOS, and what the file says of BOS tokens is not heard.

    :param path: The file.
    :param name: What to call the model in messages.
    :return: The tokenizer.
    :raises SourceError: If the tokenizer is of a kind that is not known: another would give other perplexities.
    """
    from gguf import GGUFReader  # only installed with the `hub` extra

    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    kind, splitting = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind == _BYTE_LEVEL and splitting in _SPLITTINGS:
        backend, begins_with_bos = _byte_level(fields, _SPLITTINGS[splitting])
    elif kind == _SENTENCEPIECE:
        backend, begins_with_bos = _sentencepiece(fields), True
    else:
        what = f"tokenizer.ggml.pre={splitting!r}" if kind == _BYTE_LEVEL else f"tokenizer.ggml.model={kind!r}"
        known = ", ".join([*_SPLITTINGS, "and SentencePiece's"])
        msg = f"{name} has a tokenizer of a kind that is not known ({what}; known are {known}): give the"
        msg += " folder of the model's own by --tokenizer FOLDER, load_model(..., tokenizer=FOLDER)"
        raise SourceError(msg)
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    _add_tokens(backend, tokens, fields.get("tokenizer.ggml.token_type", []))
    special = {role: tokens[fields[key]] for role, key in _SPECIAL_TOKENS.items() if fields.get(key) is not None}
    ends = {
        "bos_token": fields.get("tokenizer.ggml.add_bos_token", begins_with_bos),
        "eos_token": fields.get("tokenizer.ggml.add_eos_token", False),
    }
    _frame(backend, *(special.get(role, "") if is_added else "" for role, is_added in ends.items()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(fields: dict[str, Any], splitting: _Splitting) -> tuple[Tokenizer, bool]:
    vocabulary = {token: index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.ignores_merges))
    backend.pre_tokenizer = splitting.pre_tokenizer()
    if splitting.is_composed:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.begins_with_bos


def _sentencepiece(fields: dict[str, Any]) -> Tokenizer:
    """Build SentencePiece's BPE, whose merges are not in the file: they follow from the pieces' scores."""
    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = dict(zip(tokens, fields["tokenizer.ggml.scores"], strict=True))
    kinds = fields.get("tokenizer.ggml.token_type", [])
    # Of what is looked for before, nothing is merged.
    whole = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, skip_tokens=whole),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_tokens(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [token for token, given in zip(tokens, kinds, strict=False) if given == kind]
        backend.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in found])


def _frame(backend: Tokenizer, first: str, last: str) -> None:
    """Put a token in front of a text, and one behind it; an empty one is none."""
    if first or last:
        frame = f"{first} $A {last}".strip()
        ids = [(token, backend.token_to_id(token)) for token in {first, last} if token]
        backend.post_processor = processors.TemplateProcessing(frame, f"{frame} {frame.replace('$A', '$B')}", ids)

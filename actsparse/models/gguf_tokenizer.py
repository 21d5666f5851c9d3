"""The tokenizer of a GGUF file."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# GGUF's mark of a token that text never spells.
_CONTROL_TOKEN = 3
_GGUF_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# How text is split before merging, by GGUF's name for it; other names are left to transformers.
_BYTE_LEVEL_SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


def build_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """
    Build a byte-level BPE tokenizer from a GGUF file's own fields.

    transformers 5.5 converts such a tokenizer as if it were Llama's: it puts a BOS token in front although the file
    says not to, takes BOS for EOS, does not split digits, and saves to files that load as a different tokenizer.

    :return: The tokenizer, or ``None`` where the file has one of another kind.
    """
    from gguf import GGUFReader  # only installed with the `hub` extra

    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    split = _BYTE_LEVEL_SPLITS.get(fields.get("tokenizer.ggml.pre", ""))
    if fields.get("tokenizer.ggml.model") != "gpt2" or split is None:
        return None
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL_TOKEN])
    special = {role: tokens[fields[key]] for role, key in _GGUF_SPECIAL_TOKENS.items() if fields.get(key) is not None}
    if fields.get("tokenizer.ggml.add_bos_token") and (bos := special.get("bos_token")):
        ids = [(bos, tokens.index(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer

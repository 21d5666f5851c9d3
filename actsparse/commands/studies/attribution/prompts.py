"""How questions are put to a model."""

from collections.abc import Sequence
from typing import Any

from actsparse.errors import ActsparseError


def encode_questions(tokenizer: Any, questions: Sequence[str], prompt: str | None = None) -> list[list[int]]:
    """
    Turn questions into prompts.

    :param prompt: A text with {question} in it; None takes the tokenizer's chat template, or a plain form without one.
    :raises ActsparseError: If a prompt has fewer than two tokens: the last one is where generation begins.
    """
    prompts = []
    for question in questions:
        if prompt is not None:
            prompts.append(tokenizer.encode(prompt.replace("{question}", question)))
        elif getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
            prompts.append(tokenizer.encode(text, add_special_tokens=False))
        else:
            prompts.append(tokenizer.encode(f"Question: {question}\nAnswer:"))
    short = next((q for q, ids in zip(questions, prompts, strict=True) if len(ids) < 2), None)
    if short is not None:
        msg = f"a prompt must have two tokens or more, which the one of {short!r} has not"
        raise ActsparseError(msg)
    return prompts

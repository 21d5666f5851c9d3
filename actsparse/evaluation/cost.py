"""What a model's masks cost: word perplexity and measured sparsity in one pass over a text."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actsparse.evaluation.sparsity import count_zeros
from actsparse.evaluation.word_perplexity import WordPerplexity, word_perplexity
from actsparse.sparsity_report import SparsityReport


@dataclass(frozen=True)
class Cost:
    """
    One model on one text.

    :param perplexity: What the model makes of the text.
    :param sparsity: Measured on the same text; None for a model without active masks.
    :param seconds: How long that took.
    """

    perplexity: WordPerplexity
    sparsity: SparsityReport | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the figures into what JSON can hold.

        :return: Perplexities, sparsity and seconds.
        """
        return {
            **asdict(self.perplexity),
            "sparsity": self.sparsity.to_dict() if self.sparsity else None,
            "evaluation_seconds": round(self.seconds, 2),
        }


def evaluate_cost(model: Any, tokenizer: Any, pages: Sequence[str], *, max_length: int | None = None) -> Cost:
    """
    Measure word perplexity and, where there are masks, sparsity.

    :param model: A causal language model, masked or not.
    :param tokenizer: Its tokenizer.
    :param pages: The text.
    :param max_length: The window in tokens; None takes 2048 or the model's own limit.
    :return: Perplexity, sparsity and seconds.
    """
    start = time.perf_counter()
    with count_zeros(model) as counter:
        perplexity = word_perplexity(counter.model, tokenizer, pages, max_length=max_length)
        sparsity = counter.report() if counter.has_masks else None
    return Cost(perplexity, sparsity, time.perf_counter() - start)

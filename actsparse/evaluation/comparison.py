"""A masked model beside itself without masks, on the same windows of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from actsparse.evaluation.bootstrap import bootstrap_interval
from actsparse.evaluation.sparsity import count_zeros
from actsparse.evaluation.windows import (
    Window,
    WindowedText,
    measure_losses,
    require_numbers,
    score_window,
    score_windows,
)
from actsparse.evaluation.word_perplexity import count_words, exp_or_infinity
from actsparse.sparsity_report import SparsityReport
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.torch.logits import split_tokens


@dataclass(frozen=True)
class LossComparison:
    """
    What the masks change of the loss, window by window.

    :param tokens: How many tokens of each window are scored, [windows].
    :param dense: Sum of their negative log-likelihoods without masks, in nats, [windows].
    :param sparse: The same with masks, [windows].
    :param sparsity: Measured on the text.
    """

    tokens: np.ndarray
    dense: np.ndarray
    sparse: np.ndarray
    sparsity: SparsityReport

    @property
    def loss_increase(self) -> float:
        """log(perplexity sparse / dense), per token."""
        return float((self.sparse - self.dense).sum() / self.tokens.sum())

    @property
    def loss_increase_interval(self) -> tuple[float, float]:
        """Its 95% interval over windows."""
        return bootstrap_interval((self.sparse - self.dense) / self.tokens, self.tokens)


@dataclass(frozen=True)
class Comparison(LossComparison):
    """
    What the masks change of the predictions, window by window.

    :param divergence: Sum over tokens of KL(dense ‖ sparse), in nats, [windows].
    :param agreement: For how many tokens both predict the same one, [windows].
    :param num_words: Words of the whole text.
    """

    divergence: np.ndarray
    agreement: np.ndarray
    num_words: int

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the comparison into what JSON can hold.

        :return: Totals, and each window's sums.
        """
        tokens = float(self.tokens.sum())
        low, high = self.loss_increase_interval
        return {
            "measured_sparsity": self.sparsity.sparsity,
            "weight_reads_skipped": self.sparsity.weight_reads_skipped,
            "word_perplexity": exp_or_infinity(self.sparse.sum() / self.num_words),
            "dense_word_perplexity": exp_or_infinity(self.dense.sum() / self.num_words),
            "token_perplexity": exp_or_infinity(self.sparse.sum() / tokens),
            "dense_token_perplexity": exp_or_infinity(self.dense.sum() / tokens),
            "loss_increase": self.loss_increase,
            "loss_increase_interval": [low, high],
            "kl_divergence": float(self.divergence.sum() / tokens),
            "top1_agreement": float(self.agreement.sum() / tokens),
            "num_words": self.num_words,
            "window_tokens": self.tokens.tolist(),
            "window_losses": self.sparse.tolist(),
            "dense_window_losses": self.dense.tolist(),
        }


def compare_with_dense(model: Any, tokenizer: Any, pages: Sequence[str], *, max_length: int = 512) -> Comparison:
    """
    Score a text with a torch model's masks and without them.

    Pages are cut into windows as by `word_perplexity`.

    :param model: A masked torch causal language model.
    :param tokenizer: Its tokenizer.
    :param pages: The text.
    :param max_length: The window in tokens.
    :return: The comparison.
    :raises ActsparseError: If a window's loss is not a finite number, with masks or without.
    """
    text = WindowedText.of(model, tokenizer, pages, max_length)
    sparsifiers = [sparsifier for _, sparsifier in named_sparsifiers(model)]
    with count_zeros(model) as counter:

        def score(ids: torch.Tensor, window: Window) -> Sequence[float]:
            sparse, targets = score_window(model, ids, window)
            with suspend_sparsifiers(sparsifiers), counter.pause():
                dense, _ = score_window(model, ids, window)
            return _compare(dense, sparse, targets)

        # Both predictions of a window are needed at once, so that runs cannot be interleaved.
        rows = score_windows(
            model, text, score, width=4, description="comparing with dense", is_finite=True, is_blockwise=False
        )
        report = counter.report()
    dense, sparse, divergence, agreement = rows.T.copy()
    return Comparison(text.num_scored, dense, sparse, report, divergence, agreement, count_words(pages))


def compare_losses(
    model: Any, tokenizer: Any, pages: Sequence[str], *, max_length: int = 512, dense: np.ndarray | None = None
) -> LossComparison:
    """
    Score a text with a torch model's masks, and once without them.

    :param model: A masked torch causal language model.
    :param tokenizer: Its tokenizer.
    :param pages: The text.
    :param max_length: The window in tokens.
    :param dense: What an earlier comparison of the same model and text found without masks; None measures it.
    :return: The comparison.
    :raises ActsparseError: If a window's loss is not a finite number, with masks or without.
    """
    text = WindowedText.of(model, tokenizer, pages, max_length)
    if dense is None:
        with suspend_sparsifiers(sparsifier for _, sparsifier in named_sparsifiers(model)):
            dense = measure_losses(model, text, description="without masks", is_finite=True)
    require_numbers(dense[:, None], text, is_finite=True)
    with count_zeros(model) as counter:
        losses = measure_losses(model, text, description="with masks", is_finite=True)
        report = counter.report()
    return LossComparison(text.num_scored, dense, losses, report)


def _compare(dense: torch.Tensor, sparse: torch.Tensor, targets: torch.Tensor) -> tuple[float, float, float, float]:
    sums = torch.zeros(4, dtype=torch.float64)
    for dense_rows, sparse_rows, labels in split_tokens(dense, sparse, targets):
        p, q = dense_rows.float().log_softmax(-1), sparse_rows.float().log_softmax(-1)
        agreement = (p.argmax(-1) == q.argmax(-1)).sum()
        divergence = F.kl_div(q, p, reduction="sum", log_target=True)
        losses = (F.nll_loss(p, labels, reduction="sum"), F.nll_loss(q, labels, reduction="sum"))
        sums += torch.stack([*losses, divergence, agreement]).double()
    dense_loss, sparse_loss, divergence, agreement = sums.tolist()
    return dense_loss, sparse_loss, divergence, agreement

"""A masked model beside itself without masks, on the same windows of text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from actsparse import distributed
from actsparse.calibration import evaluation_mode
from actsparse.errors import ActsparseError
from actsparse.evaluation.bootstrap import bootstrap_interval
from actsparse.evaluation.sparsity import SparsityReport, count_zeros
from actsparse.evaluation.wikitext import detokenize
from actsparse.evaluation.word_perplexity import (
    count_words,
    encode_page,
    exp_or_infinity,
    prefix_token,
    refuse_nan,
    resolve_max_length,
    rolling_windows,
    score_window,
)
from actsparse.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.logits import split_tokens, sum_losses
from actsparse.progress import progress_bar


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
    sparsifiers = [sparsifier for _, sparsifier in named_sparsifiers(model)]
    with _scoring(model, tokenizer, pages, max_length) as scoring:
        rows = np.zeros((len(scoring.windows), 5))
        for number, ids, window in scoring.go_through():
            sparse, targets = score_window(model, ids, window)
            with suspend_sparsifiers(sparsifiers), scoring.counter.pause():
                dense, _ = score_window(model, ids, window)
            rows[number] = (len(targets), *_compare(dense, sparse, targets))
        scoring.add_up(rows)
        report = scoring.counter.report()
    tokens, dense, sparse, divergence, agreement = rows.T.copy()
    return Comparison(tokens, dense, sparse, report, divergence, agreement, count_words(pages))


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
    sparsifiers = [sparsifier for _, sparsifier in named_sparsifiers(model)]
    with _scoring(model, tokenizer, pages, max_length) as scoring:
        rows = np.zeros((len(scoring.windows), 3))
        for number, ids, window in scoring.go_through():
            loss, count = _window_loss(model, ids, window)
            if dense is None:
                with suspend_sparsifiers(sparsifiers), scoring.counter.pause():
                    without, _ = _window_loss(model, ids, window)
            else:
                without = float(dense[number])
            rows[number] = (count, without, loss)
        scoring.add_up(rows)
        report = scoring.counter.report()
    tokens, without, losses = rows.T.copy()
    return LossComparison(tokens, without, losses, report)


@dataclass(frozen=True)
class _Scoring:
    """The windows of a text, and the counter of zeros that watches while they are scored."""

    pages: Sequence[str]
    page_of: list[int]
    windows: list[tuple[torch.Tensor, Any]]
    counter: Any
    advance: Callable[[int], None]

    def go_through(self) -> Iterator[tuple[int, torch.Tensor, Any]]:
        """Go through this process's share: number, tokens and window."""
        for number in distributed.share(range(len(self.windows))):
            yield number, *self.windows[number]
            self.advance(1)

    def add_up(self, rows: np.ndarray) -> None:
        """Add up what processes found: of each window its tokens, its losses without masks and with them, and more."""
        distributed.add_up_array(rows)
        losses = rows[:, 1] + rows[:, 2]
        refuse_nan(losses, self.page_of, self.pages)
        if np.isinf(losses).any():
            # A perplexity may be infinite; a difference of such losses is not a number.
            page = self.page_of[int(np.isinf(losses).argmax())]
            msg = f"the model rules out a token of page {page + 1} of {len(self.pages)}: its loss there is infinite"
            raise ActsparseError(msg)


@contextmanager
def _scoring(model: Any, tokenizer: Any, pages: Sequence[str], max_length: int) -> Iterator[_Scoring]:
    """Cut pages into windows, and count zeros while they are gone through."""
    window_length = resolve_max_length(model, tokenizer, max_length)
    prefix = prefix_token(tokenizer)
    page_ids = [torch.tensor([prefix, *encode_page(tokenizer, detokenize(page), prefix)]) for page in pages]
    by_page = [list(rolling_windows(len(ids) - 1, window_length)) for ids in page_ids]
    page_of = [number for number, windows in enumerate(by_page) for _ in windows]
    windows = [(ids, window) for ids, windows in zip(page_ids, by_page, strict=True) for window in windows]
    total = len(distributed.share(windows))
    bar = progress_bar("comparing with dense", total=total, unit="windows")
    with evaluation_mode(model), torch.no_grad(), bar as advance, count_zeros(model) as counter:
        yield _Scoring(pages, page_of, windows, counter, advance)


def _window_loss(model: Any, ids: torch.Tensor, window: Any) -> tuple[float, int]:
    logits, targets = score_window(model, ids, window)
    return sum_losses(logits, targets), len(targets)


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

"""A text's loss, window by window, of any model that can be run."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from actsparse.calibration import evaluation_mode
from actsparse.errors import ActsparseError
from actsparse.evaluation.wikitext import detokenize
from actsparse.evaluation.word_perplexity import encode_page, prefix_token, rolling_windows, score_window
from actsparse.logits import sum_losses
from actsparse.progress import progress_bar


def measure_losses(
    model: Any, tokenizer: Any, pages: Sequence[str], *, max_length: int, description: str
) -> tuple[np.ndarray, np.ndarray]:
    """
    Score a text in windows, which are those of `word_perplexity`.

    :param model: What returns logits, as `score_window` takes it.
    :param tokenizer: Its tokenizer.
    :param pages: The text.
    :param max_length: The window in tokens, which the model can read.
    :param description: What the progress bar says.
    :return: How many tokens of each window are scored and the sum of their negative log-likelihoods in nats, [windows].
    :raises ActsparseError: If a loss is not a finite number.
    """
    prefix = prefix_token(tokenizer)
    page_ids = [torch.tensor([prefix, *encode_page(tokenizer, detokenize(page), prefix)]) for page in pages]
    windows = [(ids, window) for ids in page_ids for window in rolling_windows(len(ids) - 1, max_length)]
    losses = []
    bar = progress_bar(description, total=len(windows), unit="windows")
    with evaluation_mode(model), torch.no_grad(), bar as advance:
        for number, (ids, window) in enumerate(windows, start=1):
            loss = sum_losses(*score_window(model, ids, window))
            if not math.isfinite(loss):
                msg = f"the loss of window {number} of {len(windows)} of the evaluation text is {loss}"
                raise ActsparseError(msg)
            losses.append(loss)
            advance(1)
    return np.array([window.num_scored for _, window in windows], np.float64), np.array(losses)

"""Which calibration windows a seed takes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from actsparse.commands.regression.case import Calibration
from actsparse.commands.regression.prepare import calibration_windows
from actsparse.errors import DatasetError
from actsparse.texts import load_pages, token_batches


def test_seed_0_takes_the_first_windows_and_others_draw_without_repeats(files: Path) -> None:
    tokenizer, text = AutoTokenizer.from_pretrained(files / "model"), load_pages(files / "calibration.txt")
    size = Calibration(batches=5, length=50)
    everything = token_batches(tokenizer, text, num_batches=24, length=50)
    first = calibration_windows(tokenizer, text, size, 0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, everything, strict=False))
    draws = set()
    for seed in range(1, 6):
        ids = [batch["input_ids"] for batch in calibration_windows(tokenizer, text, size, seed)]
        again = [batch["input_ids"] for batch in calibration_windows(tokenizer, text, size, seed)]
        assert all(torch.equal(a, b) for a, b in zip(ids, again, strict=True))
        places = tuple(next(i for i, b in enumerate(everything) if torch.equal(b["input_ids"], x)) for x in ids)
        assert len(set(places)) == 5
        draws.add(places)
    assert len(draws) == 5
    for seed in (0, 1):
        with pytest.raises(DatasetError, match="too short"):
            calibration_windows(tokenizer, text, Calibration(batches=25, length=50), seed)

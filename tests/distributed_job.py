"""What tests/runtime/test_distributed.py runs in each of several processes, and in one alone."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from actsparse import measure_sparsity, save_thresholds, sparsify_activations, word_perplexity
from actsparse.errors import ActsparseError
from actsparse.evaluation.comparison import compare_with_dense
from actsparse.models import load_model
from actsparse.runtime import distributed
from actsparse.runtime.process import is_launched
from actsparse.texts import load_pages, token_batches

ALGORITHMS = (
    "magnitude",
    "auto",
    "fisher",
    "corrected-gxo+global",
    "teal",
    "cett",
    "scap",
    "r-sparse",
    "measured+global",
)


def run(files: Path, out: Path) -> None:
    """Calibrate with every algorithm, and evaluate."""
    loaded = load_model(str(files / "model"))
    model, tokenizer = loaded.model, loaded.tokenizer
    for parameter in model.parameters():
        # Wide enough that masks change its output.
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    # An odd number, so that shares differ.
    batches = token_batches(tokenizer, load_pages(files / "calibration.txt"), num_batches=5, length=32)
    pages = load_pages(files / "evaluation.txt").pages
    found = {}
    for algorithm in ALGORITHMS:
        sparsify_activations(model, batches, 0.5, algorithm=algorithm)
        save_thresholds(model, out / f"{algorithm}.safetensors")
        comparison = compare_with_dense(model, tokenizer, pages, max_length=32)
        found[algorithm] = {
            "sparsity": measure_sparsity(model, batches).to_dict(),
            "word_perplexity": word_perplexity(model, tokenizer, pages, max_length=32, progress=False).word_perplexity,
            "comparison": comparison.to_dict(),
        }
    found["mistakes"] = {
        "other data": _mistake(lambda: sparsify_activations(model, batches[: 4 + distributed.rank()], 0.5)),
        "order": _mistake(lambda: sparsify_activations(model, batches, 0.5, algorithm="nncf")),
    }
    (out / f"{distributed.rank()}.json").write_text(json.dumps(found))


def _mistake(call) -> str:
    try:
        call()
    except ActsparseError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.together() if is_launched() else nullcontext():
        run(Path(sys.argv[1]), Path(sys.argv[2]))

"""Deploy thresholds that were calibrated elsewhere: no calibration data, the same perplexity gate.

Where the gate fails, one line says so, the exit code is 1, and there is no folder.
"""

import sys
from pathlib import Path
from typing import Annotated

import nncf
import typer

from actsparse import load_thresholds, word_perplexity
from actsparse.models import load_model
from actsparse.openvino import deploy_model, load_causal_lm
from actsparse.texts import load_pages


def deploy(
    thresholds: Annotated[Path, typer.Argument(help="What save_thresholds or actsparse sparsify wrote.")] = Path(
        "thresholds.safetensors"
    ),
    model: Annotated[str, typer.Option(help="The model that they were calibrated on.")] = "default",
    out: Annotated[Path, typer.Option(help="The folder to deploy to.")] = Path("deployed"),
    fail_above: Annotated[float, typer.Option(help="The largest share that perplexity may grow by.")] = 0.3,
    pages: Annotated[int, typer.Option(help="Evaluate on the first N pages.")] = 2,
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The history of bridges",
) -> None:
    """Compress, mask, check, deploy, generate."""
    loaded = load_model(model)
    tokenizer = loaded.tokenizer
    text = load_pages("default", num_pages=pages)
    dense = word_perplexity(loaded.model, tokenizer, text.pages).token_perplexity

    # NNCF traces the model with this one input; it calibrates nothing.
    example = {"input_ids": tokenizer(prompt, return_tensors="pt")["input_ids"]}
    sparse_model = nncf.compress_weights(
        loaded.model, mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset([example])
    )
    load_thresholds(sparse_model, thresholds)
    sparse = word_perplexity(sparse_model, tokenizer, text.pages).token_perplexity

    told = f"token perplexity {dense:.2f} -> {sparse:.2f}, {sparse / dense - 1:+.1%}"
    if not sparse / dense - 1 <= fail_above:
        sys.exit(f"{told}, more than the {fail_above:.1%} allowed: nothing is deployed")
    acceleration = deploy_model(sparse_model, out, tokenizer)
    print(f"{told}; {len(acceleration.accelerated)} sites accelerated, {len(acceleration.kept)} not")

    tokens = load_causal_lm(out).generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(tokens[0]))


typer.run(deploy)

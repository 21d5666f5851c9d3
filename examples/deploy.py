"""Deploy a model: INT8 weights, masks, a perplexity gate, an OpenVINO folder, generation.

Where the gate fails, one line says so, the exit code is 1, and there is no folder.
"""

import sys
from pathlib import Path
from typing import Annotated

import nncf
import typer

from actsparse import save_thresholds, sparsify_activations, word_perplexity
from actsparse.models import load_model
from actsparse.openvino import deploy_model, load_causal_lm
from actsparse.texts import load_pages, token_batches


def deploy(
    model: Annotated[str, typer.Option(help="A hub id, a local folder, a GGUF file, or default.")] = "default",
    out: Annotated[Path, typer.Option(help="The folder to deploy to.")] = Path("deployed"),
    sparsity: Annotated[float, typer.Option(help="Of all Linear layers of the blocks.")] = 0.4,
    fail_above: Annotated[float, typer.Option(help="The largest share that perplexity may grow by.")] = 0.3,
    batches: Annotated[int, typer.Option(help="Calibration batches of 256 tokens.")] = 8,
    pages: Annotated[int, typer.Option(help="Evaluate on the first N pages.")] = 2,
    prompt: Annotated[str, typer.Option(help="What to continue.")] = "The history of bridges",
) -> None:
    """Compress, sparsify, check, deploy, generate."""
    loaded = load_model(model)
    tokenizer = loaded.tokenizer
    text = load_pages("default", num_pages=pages)
    data = token_batches(tokenizer, load_pages("default", purpose="calibration"), num_batches=batches, length=256)
    dense = word_perplexity(loaded.model, tokenizer, text.pages).token_perplexity

    sparse_model = nncf.compress_weights(
        loaded.model, mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset(data[:1])
    )
    sparse_model = sparsify_activations(sparse_model, data, sparsity)
    sparse = word_perplexity(sparse_model, tokenizer, text.pages).token_perplexity

    told = f"token perplexity {dense:.2f} -> {sparse:.2f}, {sparse / dense - 1:+.1%}"
    if not sparse / dense - 1 <= fail_above:
        sys.exit(f"{told}, more than the {fail_above:.1%} allowed: nothing is deployed")
    acceleration = deploy_model(sparse_model, out, tokenizer)
    save_thresholds(sparse_model, out / "thresholds.safetensors")
    print(f"{told}; {len(acceleration.accelerated)} sites accelerated, {len(acceleration.kept)} not")

    tokens = load_causal_lm(out).generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(tokens[0]))


typer.run(deploy)

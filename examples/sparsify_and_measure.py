"""Mask a real model, keep INT8, and see what it costs: the whole of actsparse in one script."""

import nncf

from actsparse import TargetScope, measure_sparsity, save_thresholds, sparsify_activations, word_perplexity
from actsparse.models import load_model
from actsparse.texts import load_pages, token_batches

loaded = load_model("default")
text = load_pages("default", num_pages=2)
batches = token_batches(loaded.tokenizer, load_pages("default", purpose="calibration"), num_batches=8, length=256)
dense = word_perplexity(loaded.model, loaded.tokenizer, text.pages)

model = nncf.compress_weights(
    loaded.model, mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset(batches[:1])
)  # fmt: skip
model = sparsify_activations(
    model,
    batches,
    {TargetScope(roles=("ffn.up", "ffn.gate")): 0.3, TargetScope(patterns=[".*down_proj.*"]): 0.5},
)
save_thresholds(model, "thresholds.safetensors", calibration="C4")

sparse = word_perplexity(model, loaded.tokenizer, text.pages)
report = measure_sparsity(model, batches[:2])
print(f"word perplexity {dense.word_perplexity:.2f} -> {sparse.word_perplexity:.2f}")
print(f"sparsity of the masked layers {report.sparsity:.1%}, weight reads skipped {report.weight_reads_skipped:.1%}")

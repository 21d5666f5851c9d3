"""Deploy thresholds that were calibrated elsewhere: no calibration data, no second copy of the model."""

import sys

from actsparse import load_thresholds, remove_sparsifiers, word_perplexity
from actsparse.models import load_model
from actsparse.texts import load_pages

path = sys.argv[1] if len(sys.argv) > 1 else "thresholds.safetensors"
loaded = load_model("default")
page = load_pages("default", num_pages=1).pages

load_thresholds(loaded.model, path)
sparse = word_perplexity(loaded.model, loaded.tokenizer, page)
remove_sparsifiers(loaded.model)
dense = word_perplexity(loaded.model, loaded.tokenizer, page)
print(f"word perplexity {dense.word_perplexity:.2f} without, {sparse.word_perplexity:.2f} with {path}")

"""From a torch model to faster generation: INT8 weights, masks, and an OpenVINO model that skips what they mask."""

import logging
import time

import nncf

from actsparse import sparsify_activations, word_perplexity
from actsparse.models import load_model
from actsparse.openvino import deploy_model, export_model, load_causal_lm
from actsparse.texts import load_pages, token_batches

logging.basicConfig(format="%(message)s")
loaded = load_model("default")
tokenizer = loaded.tokenizer
batches = token_batches(tokenizer, load_pages("default", purpose="calibration"), num_batches=8, length=256)
model = nncf.compress_weights(
    loaded.model, mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset(batches[:1])
)  # fmt: skip
export_model(model, "dense", tokenizer)

model = sparsify_activations(model, batches, 0.4)
acceleration = deploy_model(model, "accelerated", tokenizer)
print(f"{len(acceleration.accelerated)} sites accelerated, {len(acceleration.kept)} not")

prompt = tokenizer("The history of bridges", return_tensors="pt")
page = load_pages("default", num_pages=1).pages
for name in ("dense", "accelerated"):
    fast = load_causal_lm(name)
    fast.generate(**prompt, max_new_tokens=8, do_sample=False)
    start = time.perf_counter()
    tokens = fast.generate(**prompt, max_new_tokens=48, min_new_tokens=48, do_sample=False)
    speed = 48 / (time.perf_counter() - start)
    perplexity = word_perplexity(fast, tokenizer, page).word_perplexity
    print(f"{name}: word perplexity {perplexity:.2f}, {speed:.0f} tokens/s: {tokenizer.decode(tokens[0])!r}")

"""
Compare the accelerated default model's numbers with the portable graph's: tokens, perplexity, memory.

    python benchmarks/openvino_numbers.py [--json FILE]
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command import make_plain_parser, positive, run_benchmark
from report import Bar, Measurement

from actsparse import sparsify_activations, word_perplexity
from actsparse.compression import compress_int8
from actsparse.models import load_model
from actsparse.openvino import deploy_model, export_model, extension_path, load_causal_lm
from actsparse.texts import load_pages, token_batches

SPARSITY = 0.5
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PROMPT = "The history of bridges"


def generate(model: Any, tokenizer: Any, length: int) -> list[int]:
    """
    Generate greedily.

    :param model: An OpenVINO model.
    :param tokenizer: Its tokenizer.
    :param length: How many tokens.
    :return: The new tokens.
    """
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()


def generate_by_genai(folder: Path, length: int) -> str:
    """
    Generate greedily with openvino-genai.

    :param folder: An OpenVINO folder with its tokenizer.
    :param length: How many tokens.
    :return: The new text.
    """
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", extensions=[str(extension_path())], **F32)
    config = openvino_genai.GenerationConfig(max_new_tokens=length, apply_chat_template=False, do_sample=False)
    return str(pipeline.generate(PROMPT, config))


def measure(options: argparse.Namespace) -> Measurement:
    """
    Export, accelerate and compare.

    :param options: The command line.
    :return: The figures and bars.
    """
    loaded = load_model("default")
    tokenizer = loaded.tokenizer
    batches = token_batches(tokenizer, load_pages("default", purpose="calibration"), num_batches=8, length=256)
    pages = load_pages("default", num_pages=options.pages).pages
    model = sparsify_activations(compress_int8(loaded.model, "asym", batches[0]), batches, SPARSITY)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("portable", "exact", "default")}
        export_model(model, folders["portable"], tokenizer)
        deploy_model(model, folders["exact"], tokenizer, exact=True)
        deploy_model(model, folders["default"], tokenizer)
        torch_words = word_perplexity(model, tokenizer, pages).word_perplexity
        words = {
            name: word_perplexity(load_causal_lm(folder, compile=False), tokenizer, pages).word_perplexity
            for name, folder in folders.items()
        }
        models = {name: load_causal_lm(folders[name], ov_config=F32) for name in ("portable", "exact")}
        tokens = {name: generate(model, tokenizer, 64) for name, model in models.items()}
        texts = {name: generate_by_genai(folders[name], 64) for name in ("portable", "exact")}
        fast = load_causal_lm(folders["default"])
        generate(fast, tokenizer, 100)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        generate(fast, tokenizer, 2000)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    equal = sum(a == b for a, b in zip(tokens["portable"], tokens["exact"], strict=True))
    bars = (
        Bar("exact mode, optimum-intel: equal greedy tokens of 64", equal, 64, is_minimum=True),
        Bar("exact mode, openvino-genai: equal greedy text", float(texts["portable"] == texts["exact"]), 1, True),
        Bar(
            "portable graph: word perplexity off torch's", abs(words["portable"] / torch_words - 1) * 100, 0.5, unit="%"
        ),
        Bar("exact mode: word perplexity off the portable graph's", _off(words, "exact"), 0.5, unit="%"),
        Bar("default mode: word perplexity off the portable graph's", _off(words, "default"), 0.5, unit="%"),
        Bar(
            "2,000 tokens: peak memory grown since the 100th",
            grown,
            None,
            unit="MB",
            note="the KV cache is 12 kB a token",
        ),
    )
    settings = {"model": "default", "weights": "INT8_ASYM", "sparsity": SPARSITY, "pages": options.pages}
    return Measurement(
        bars, settings, {"word_perplexity": {"torch": torch_words, **words}, "tokens": tokens, "texts": texts}
    )


def _off(words: dict[str, float], name: str) -> float:
    return abs(words[name] / words["portable"] - 1) * 100


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Compare an accelerated model's numbers with the portable graph's.")
    parser.add_argument("--pages", type=positive, default=4, help="pages of the default text")
    return run_benchmark("openvino_numbers", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

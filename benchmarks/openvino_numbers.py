"""
Compare the accelerated default model's numbers with the portable graph's: tokens, perplexity, memory.

    python benchmarks/openvino_numbers.py [--text SOURCE] [--pages N] [--json FILE]
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from workload import load_wikitext

from actsparse import sparsify_activations, word_perplexity
from actsparse.evaluation.bootstrap import bootstrap_interval
from actsparse.evaluation.word_perplexity import count_words
from actsparse.models import load_model
from actsparse.openvino import deploy_model, export_model, extension_path, load_causal_lm
from actsparse.openvino.runner import EXACT, OpenVinoLanguageModel, Runner
from actsparse.runtime.progress import progress_bar
from actsparse.texts import Text, load_pages, token_batches
from actsparse.torch.compression import compress_int8

SPARSITY = 0.5
NEW_TOKENS = 64
# Sums in another order: as far as the same model is from itself.
ONE_THREAD = {**EXACT, "INFERENCE_NUM_THREADS": "1"}
PROMPTS = (
    "The history of bridges",
    "Water is a",
    "In 1969, the first",
    "The capital of France",
    "Once upon a time",
    "Machine learning is",
    "The most important thing about music",
    "A good recipe for bread",
    "How do plants grow?",
    "The President of the United States",
    "The city of London",
    "Albert Einstein was",
    "My favourite book",
    "The sun rises",
    "Computers were first",
)


def generate(model: Any, tokenizer: Any, prompt: str, length: int = NEW_TOKENS) -> list[int]:
    """
    Generate greedily.

    :param model: An OpenVINO model.
    :param tokenizer: Its tokenizer.
    :param prompt: What comes before.
    :param length: How many tokens.
    :return: The new tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def generate_by_genai(folder: Path) -> str:
    """
    Generate greedily with openvino-genai after the first prompt.

    :param folder: An OpenVINO folder with its tokenizer.
    :return: The new text.
    """
    import openvino_genai

    properties: dict[str, Any] = {"extensions": [str(extension_path())], **EXACT}
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **properties)
    config = openvino_genai.GenerationConfig(max_new_tokens=NEW_TOKENS, apply_chat_template=False, do_sample=False)
    return str(pipeline.generate(PROMPTS[0], config))


def score_pages(model: Any, tokenizer: Any, pages: Sequence[str]) -> np.ndarray:
    """
    Compute each page's loss.

    :param model: A torch model, or one that looks like it.
    :param tokenizer: Its tokenizer.
    :param pages: The text.
    :return: Nats, [pages].
    """
    with progress_bar("pages", total=len(pages)) as advance:
        losses = []
        for page in pages:
            losses.append(word_perplexity(model, tokenizer, [page], progress=False).negative_log_likelihood)
            advance(1)
    return np.array(losses)


def compare_perplexity(name: str, losses: np.ndarray, reference: np.ndarray, words: np.ndarray) -> Bar:
    """
    Compare the word perplexity of two models on the same pages.

    :param name: What the bar is called.
    :param losses: Each page's loss, [pages].
    :param reference: The same of the model to compare with.
    :param words: How many words each page has.
    :return: How far their word perplexities are apart, with a bootstrap interval over pages.
    """
    difference = losses - reference
    whole = np.expm1(difference.sum() / words.sum()) * 100
    low, high = (np.expm1(end) * 100 for end in bootstrap_interval(difference / words, words))
    return Bar(name, abs(float(whole)), 0.5, unit="%", note=f"{whole:+.2f} %, 95% interval {low:+.2f} to {high:+.2f}")


def measure_tokens(folders: dict[str, Path], tokenizer: Any) -> tuple[list[Bar], dict[str, Any]]:
    """
    Compare greedy tokens.

    :param folders: The OpenVINO folders.
    :param tokenizer: Their tokenizer.
    :return: Bars, and the tokens.
    """
    runs = {"portable": ("portable", EXACT), "exact": ("exact", EXACT), "one thread": ("portable", ONE_THREAD)}
    tokens = {}
    for name, (folder, config) in runs.items():
        announce(f"generate: {name}")
        model = load_causal_lm(folders[folder], ov_config=config)
        tokens[name] = [generate(model, tokenizer, prompt) for prompt in PROMPTS]
    same = {
        name: sum(a == b for a, b in zip(tokens["portable"], tokens[name], strict=True))
        for name in ("exact", "one thread")
    }
    first = sum(a == b for a, b in zip(tokens["portable"][0], tokens["exact"][0], strict=True))
    texts = {name: generate_by_genai(folders[name]) for name in ("portable", "exact")}
    prompts = f"{len(PROMPTS)} prompts"
    bars = [
        Bar("exact mode, optimum-intel: equal greedy tokens of 64", first, NEW_TOKENS, is_minimum=True),
        Bar("exact mode, openvino-genai: equal greedy text", float(texts["portable"] == texts["exact"]), 1, True),
        Bar(f"exact mode: all 64 tokens equal, of {prompts}", same["exact"]),
        Bar(f"portable graph on one thread: the same, of {prompts}", same["one thread"]),
    ]
    return bars, {"tokens": tokens, "texts": texts}


def measure_perplexity(
    model: Any, folders: dict[str, Path], tokenizer: Any, pages: Sequence[str]
) -> tuple[list[Bar], dict[str, Any]]:
    """
    Compare word perplexity.

    :param model: The masked torch model.
    :param folders: Its OpenVINO folders.
    :param tokenizer: Its tokenizer.
    :param pages: The text.
    :return: Bars, and each page's loss.
    """
    runs: dict[str, tuple[str, dict[str, str]]] = {
        "portable": ("portable", EXACT),
        "exact": ("exact", EXACT),
        "accelerated": ("default", {}),
        "openvino": ("portable", {}),
    }
    announce("perplexity: torch")
    losses = {"torch": score_pages(model, tokenizer, pages)}
    for name, (folder, config) in runs.items():
        announce(f"perplexity: {name}")
        converted = load_causal_lm(folders[folder], compile=False)
        runnable = OpenVinoLanguageModel(Runner(converted.model, config), converted.config)
        losses[name] = score_pages(runnable, tokenizer, pages)
    words = np.array([count_words([page]) for page in pages])
    title = "word perplexity off"
    bars = [
        compare_perplexity(f"portable graph: {title} torch's", losses["portable"], losses["torch"], words),
        compare_perplexity(f"exact mode: {title} the portable graph's", losses["exact"], losses["portable"], words),
        compare_perplexity(
            f"default mode: {title} OpenVINO's default", losses["accelerated"], losses["openvino"], words
        ),
    ]
    perplexities = {name: float(np.exp(loss.sum() / words.sum())) for name, loss in losses.items()}
    return bars, {
        "word_perplexity": perplexities,
        "page_losses": {name: loss.tolist() for name, loss in losses.items()},
        "page_words": words.tolist(),
    }


def measure_memory(folders: dict[str, Path], tokenizer: Any) -> list[Bar]:
    """
    Generate for long.

    :param folders: The OpenVINO folders.
    :param tokenizer: Their tokenizer.
    :return: By how much memory grew, of the accelerated model and of the portable one.
    """
    grown = {}
    for name in ("default", "portable"):
        announce(f"generate 2,000 tokens: {name}")
        model = load_causal_lm(folders[name])
        generate(model, tokenizer, PROMPTS[0], 100)
        before = resident_memory()
        generate(model, tokenizer, PROMPTS[0], 2000)
        grown[name] = (resident_memory() - before) / 2**20
    note = "the same of OpenVINO's masked model, with its KV cache: {:.0f} MB".format(grown["portable"])
    return [Bar("2,000 tokens: memory grown since the 100th", grown["default"], None, unit="MB", note=note)]


def resident_memory() -> int:
    """
    Read this process's memory (Linux).

    :return: Resident bytes.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(options: argparse.Namespace) -> Measurement:
    """
    Export, accelerate and compare.

    :param options: The command line.
    :return: The figures and bars.
    """
    loaded = load_model("default")
    tokenizer = loaded.tokenizer
    batches = token_batches(tokenizer, load_pages("default", purpose="calibration"), num_batches=8, length=256)
    text = load_wikitext() if options.text == "wikitext" else load_pages(options.text)
    text = Text(text.name, text.pages[: options.pages])
    model = sparsify_activations(compress_int8(loaded.model, "asym", batches[0]), batches, SPARSITY)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name in ("portable", "exact", "default")}
        export_model(model, folders["portable"], tokenizer)
        deploy_model(model, folders["exact"], tokenizer, exact=True)
        deploy_model(model, folders["default"], tokenizer)
        # Memory first: what the other measurements free would be used again, and hide what it grows by.
        memory_bars = measure_memory(folders, tokenizer)
        token_bars, tokens = measure_tokens(folders, tokenizer)
        bars, losses = measure_perplexity(model, folders, tokenizer, text.pages)
    settings = {
        "model": "default",
        "weights": "INT8_ASYM",
        "sparsity": SPARSITY,
        "text": text.name,
        "pages": len(text.pages),
    }
    return Measurement((*token_bars, *bars, *memory_bars), settings, {**losses, **tokens})


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Compare an accelerated model's numbers with the portable graph's.")
    parser.add_argument("--text", default="wikitext", help="text for perplexity: any text source")
    parser.add_argument("--pages", type=positive, default=20, help="how many of its pages")
    return run_benchmark("openvino_numbers", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

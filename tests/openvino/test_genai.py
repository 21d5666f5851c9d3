"""openvino-genai on both of its backends: the same tokens as optimum-intel, or a refusal that says why."""

import json
import runpy
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openvino as ov
import pytest
import uvicorn
from openvino._offline_transformations import paged_attention_transformation

from actsparse import sparsify_activations
from actsparse.commands.bench.prepare import find_source, prepare_dense
from actsparse.models import load_model
from actsparse.openvino import accelerate, deploy_model, export_model, extension_path, load_causal_lm
from actsparse.openvino.graph_masks import find_masks
from actsparse.openvino.runner import EXACT
from actsparse.texts import load_pages, token_batches
from actsparse.torch.compression import compress_int8

genai = pytest.importorskip("openvino_genai")

# The model is sure how these go on: two ways to round do not turn a token.
PROMPTS = [
    "1, 2, 3, 4, 5, 6, 7,",
    "A B C D E F G H",
    "Monday, Tuesday, Wednesday,",
    "one two three four one two three four",
]
NEW_TOKENS = 8
# Both backends keep keys and values in their own precision by default.
SETTINGS = {**EXACT, "KV_CACHE_PRECISION": "f32"}


def read_batches(tokenizer: Any) -> list[dict[str, Any]]:
    return token_batches(tokenizer, load_pages("default", purpose="calibration"), num_batches=4, length=64)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, as it is deployed."""
    folder, loaded = tmp_path_factory.mktemp("deployed"), load_model("default")
    batches = read_batches(loaded.tokenizer)
    model = sparsify_activations(compress_int8(loaded.model, "asym", batches[0]), batches, 0.3)
    assert not deploy_model(model, folder, loaded.tokenizer, exact=True).kept
    return folder


def generate_by_optimum(folder: Path) -> list[str]:
    model = load_causal_lm(folder, ov_config=SETTINGS)
    tokenizer: Any = load_model("default").tokenizer
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        texts.append(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def make_settings(**settings: Any) -> Any:
    return genai.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, apply_chat_template=False, **settings)


def generate(folder: Path, backend: str) -> list[str]:
    pipeline = genai.LLMPipeline(
        folder, "CPU", ATTENTION_BACKEND=backend, extensions=[str(extension_path())], **SETTINGS
    )
    return [str(pipeline.generate(prompt, make_settings())) for prompt in PROMPTS]


@pytest.mark.real_model
def test_every_way_to_generate_gives_the_same_tokens(deployed: Path) -> None:
    expected = generate_by_optimum(deployed)
    assert generate(deployed, "SDPA") == expected
    # Named, because openvino-genai turns to SDPA without a word where it cannot convert a model.
    assert generate(deployed, "PA") == expected
    properties = {**SETTINGS, "extensions": [str(extension_path())]}
    together = genai.ContinuousBatchingPipeline(deployed, genai.SchedulerConfig(), "CPU", properties)
    results = together.generate(PROMPTS, [make_settings()] * len(PROMPTS))
    assert [result.m_generation_ids[0] for result in results] == expected
    lookup = genai.LLMPipeline(deployed, "CPU", ATTENTION_BACKEND="PA", prompt_lookup=True, **properties)
    settings = make_settings(num_assistant_tokens=4, max_ngram_size=3)
    assert [str(lookup.generate(prompt, settings)) for prompt in PROMPTS] == expected


@contextmanager
def serving(app: Any) -> Iterator[httpx.Client]:
    """Serve an application on the loopback, on a port of the system's choice."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def read_stream(client: httpx.Client, url: str, request: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", url, json=request | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line)["choices"][0] for line in lines]


@pytest.mark.real_model
def test_the_serving_example_answers_eight_at_once_as_each_alone(deployed: Path) -> None:
    expected = generate_by_optimum(deployed)
    serve = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serve.py"))
    app = serve["make_app"](serve["Engine"](deployed, **SETTINGS), "masked")
    with serving(app) as client, ThreadPoolExecutor(8) as pool:

        def complete(prompt: str) -> Any:
            request = {"prompt": prompt, "max_tokens": NEW_TOKENS}
            return client.post("/v1/completions", json=request).raise_for_status().json()

        answers = [*pool.map(complete, [*PROMPTS, *PROMPTS])]
        assert [answer["choices"][0]["text"] for answer in answers] == [*expected, *expected]
        assert {answer["choices"][0]["finish_reason"] for answer in answers} == {"length"}
        assert len({answer["id"] for answer in answers}) == 8
        assert answers[0]["usage"] == {"completion_tokens": NEW_TOKENS}
        pieces = read_stream(client, "/v1/completions", {"prompt": PROMPTS[0], "max_tokens": NEW_TOKENS})
        assert "".join(piece["text"] for piece in pieces) == expected[0]
        assert len(pieces) > 4
        assert pieces[-1]["finish_reason"] == "length"
        chat = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": NEW_TOKENS}
        whole = client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
        assert "".join(p["delta"]["content"] for p in read_stream(client, "/v1/chat/completions", chat)) == whole != ""
        for wrong in ({}, {"prompt": 1}, {"prompt": "x", "max_tokens": 0}):
            assert client.post("/v1/completions", json=wrong).status_code == 422
        assert client.get("/v1/models").json()["data"][0]["id"] == "masked"


@pytest.mark.real_model
def test_masks_of_decoded_tokens_are_refused_where_prompts_cannot_be_told(deployed: Path, tmp_path: Path) -> None:
    # All but the masks is converted already: for the benchmarks, and for the tokenizer beside the deployed model.
    folder = shutil.copytree(deployed, tmp_path / "decode")
    dense = prepare_dense(find_source("default"), "int8", lambda _: None)
    model = ov.Core().read_model(dense.xml)
    sparsify_activations(model, read_batches(dense.load_tokenizer()), 0.3, tokens="decode")
    assert not accelerate(model, exact=True).kept
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    with pytest.raises(RuntimeError, match="set ATTENTION_BACKEND to SDPA"):
        generate(folder, "PA")
    assert generate(folder, "SDPA") == generate_by_optimum(folder)


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["portable", "accelerated"])
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude+uniform+rows"])
def test_a_graph_without_sequences_refuses_decode_masks(
    make_model: Any, make_batches: Callable[..., Any], tmp_path: Path, is_accelerated: bool, algorithm: str
) -> None:
    batches = make_batches()
    model = compress_int8(make_model("llama"), "asym", batches[0])
    sparsify_activations(model, batches, 0.5, tokens="decode", algorithm=algorithm)
    converted = ov.Core().read_model(export_model(model, tmp_path) / "openvino_model.xml")
    assert {mask.tokens for mask in find_masks(converted)} == {"decode"}
    if is_accelerated:
        assert not accelerate(converted).kept
    with pytest.raises(RuntimeError, match="ATTENTION_BACKEND" if is_accelerated else "attention_mask"):
        paged_attention_transformation(converted)


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["portable", "accelerated"])
def test_masks_of_all_tokens_need_no_sequences(
    make_openvino_model: Callable[..., ov.Model], make_batches: Callable[..., Any], is_accelerated: bool
) -> None:
    model = make_openvino_model("llama", "INT8_ASYM")
    sparsify_activations(model, make_batches(), 0.5)
    if is_accelerated:
        accelerate(model)
    paged_attention_transformation(model)
    ov.Core().compile_model(model, "CPU")

"""
Serve an accelerated folder to many at once, as OpenAI's API does: completions and chat, streamed or whole.

    pip install fastapi uvicorn
    python serve.py FOLDER [--host 127.0.0.1] [--port 8000]

    curl localhost:8000/v1/completions -H 'content-type: application/json' \
        -d '{"prompt": "The capital of France is", "max_tokens": 16}'

Requests that come together are decoded together, by openvino-genai's continuous batching.
"""

import argparse
import asyncio
import itertools
import json
import queue
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openvino_genai as genai
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from openvino_genai.py_openvino_genai import GenerationFinishReason, GenerationStatus
from pydantic import BaseModel, Field

from actsparse.openvino import extension_path


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class Settings(BaseModel):
    """What every request may say."""

    max_tokens: int = Field(128, ge=1, le=100_000)
    temperature: float = Field(0.0, ge=0.0, le=2.0)
    stream: bool = False


class Completion(Settings):
    """A text to be continued."""

    prompt: str


class Chat(Settings):
    """A conversation to be answered."""

    messages: list[Message] = Field(min_length=1)


class Answer:
    """What is generated for one request: tokens come from the engine's thread, text goes to the server's."""

    def __init__(self, prompt: str, settings: Settings) -> None:
        self.prompt = prompt
        self.config = genai.GenerationConfig(max_new_tokens=settings.max_tokens, apply_chat_template=False)
        self.config.do_sample = settings.temperature > 0
        if settings.temperature > 0:
            self.config.temperature = settings.temperature
        self.is_wanted = True
        self.finish_reason: str | None = None
        self.tokens: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[list[int] | None] = asyncio.Queue()

    def put(self, tokens: list[int] | None) -> None:
        """Hand over tokens, or None at the end."""
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, tokens)

    async def pieces(self, tokenizer: Any) -> AsyncIterator[str]:
        """Yield the text as it grows: a character may take several tokens."""
        said = ""
        try:
            while (tokens := await self._arrived.get()) is not None:
                self.tokens += tokens
                text = tokenizer.decode(self.tokens)
                if len(text) > len(said) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield text[len(said) :]
                    said = text
            if rest := tokenizer.decode(self.tokens)[len(said) :]:
                yield rest
        finally:
            self.is_wanted = False


class Engine(threading.Thread):
    """The pipeline and the only thread that touches it."""

    def __init__(self, folder: Path, **properties: Any) -> None:
        super().__init__(daemon=True)
        properties = {"extensions": [str(extension_path())], **properties}
        self._pipeline = genai.ContinuousBatchingPipeline(folder, genai.SchedulerConfig(), "CPU", properties)
        self._waiting: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.tokenizer = self._pipeline.get_tokenizer()

    def ask(self, prompt: str, settings: Settings) -> Answer:
        """Send a request to the thread."""
        answer = Answer(prompt, settings)
        self._waiting.put(answer)
        return answer

    def run(self) -> None:
        """Decode whatever there is, all requests together."""
        running: dict[Any, Answer] = {}
        numbers = itertools.count()
        while True:
            while not running or not self._waiting.empty():
                answer = self._waiting.get()
                running[self._pipeline.add_request(next(numbers), answer.prompt, answer.config)] = answer
            self._pipeline.step()
            for handle, answer in [*running.items()]:
                while handle.can_read():
                    for output in handle.read().values():
                        answer.put(output.generated_ids)
                        is_cut = output.finish_reason == GenerationFinishReason.LENGTH
                        answer.finish_reason = "length" if is_cut else "stop"
                if not answer.is_wanted:
                    handle.cancel()
                if handle.get_status() != GenerationStatus.RUNNING or not answer.is_wanted:
                    answer.put(None)
                    del running[handle]


def make_app(engine: Engine, model: str) -> FastAPI:
    """
    Make the server.

    :param engine: Decodes; it is started here.
    :param model: What answers call the model.
    """
    app, numbers = FastAPI(title="actsparse"), itertools.count()
    engine.start()

    async def respond(kind: str, prompt: str, settings: Settings, wrap: Any) -> Any:
        answer = engine.ask(prompt, settings)
        head = {"id": f"{kind}-{next(numbers)}", "object": kind, "created": int(time.time()), "model": model}

        def choice(text: str, is_piece: bool) -> dict[str, Any]:
            reason = None if is_piece and text else answer.finish_reason
            return head | {"choices": [{"index": 0, **wrap(text, is_piece), "finish_reason": reason}]}

        async def events() -> AsyncIterator[str]:
            async for piece in answer.pieces(engine.tokenizer):
                yield f"data: {json.dumps(choice(piece, True))}\n\n"
            yield f"data: {json.dumps(choice('', True))}\n\ndata: [DONE]\n\n"

        if settings.stream:
            return StreamingResponse(events(), media_type="text/event-stream")
        text = "".join([piece async for piece in answer.pieces(engine.tokenizer)])
        if answer.finish_reason is None:
            raise HTTPException(400, "the prompt does not fit into the memory for keys and values")
        return choice(text, False) | {"usage": {"completion_tokens": len(answer.tokens)}}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": model, "object": "model"}]}

    @app.post("/v1/completions")
    async def complete(request: Completion) -> Any:
        return await respond("text_completion", request.prompt, request, lambda text, _: {"text": text})

    @app.post("/v1/chat/completions")
    async def chat(request: Chat) -> Any:
        history = [message.model_dump() for message in request.messages]
        prompt = engine.tokenizer.apply_chat_template(history, add_generation_prompt=True)

        def wrap(text: str, is_piece: bool) -> dict[str, Any]:
            return {"delta" if is_piece else "message": {"role": "assistant", "content": text}}

        return await respond("chat.completion", prompt, request, wrap)

    return app


def main() -> None:
    """Run the server until it is interrupted."""
    parser = argparse.ArgumentParser(description="Serve an accelerated folder, as OpenAI's API does.")
    parser.add_argument("folder", type=Path, help="what `actsparse sparsify --accelerate` or deploy.py wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if not (options.folder / "openvino_model.xml").is_file():
        parser.error(f"{options.folder} holds no OpenVINO model")
    uvicorn.run(make_app(Engine(options.folder), options.folder.name), host=options.host, port=options.port)


if __name__ == "__main__":
    main()

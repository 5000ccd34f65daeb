"""A server whose every answer is written beforehand, over real HTTP, in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

from aiohttp import web

MODEL = "scripted"


@dataclass
class Seen:
    """What the server has received, and when it wrote each chunk of text, by request id."""

    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    received_ns: dict[str, int] = field(default_factory=dict)
    written_ns: dict[str, list[int]] = field(default_factory=dict)
    ended_ns: dict[str, int] = field(default_factory=dict)


Answer = Callable[[web.Request, dict[str, Any], Seen, str], Any]


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    chunk = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": choices, **more}
    return f"data: {json.dumps(chunk)}\n\n".encode()


def text_event(text: str, finish_reason: str | None = None) -> bytes:
    return event([{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}])


def usage_event(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int | None = None) -> bytes:
    usage: dict[str, Any] = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_output_tokens}
    if num_cached_tokens is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": num_cached_tokens}
    return event([], usage=usage)


async def open_stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    return response


def streaming(gap_s: float = 0.0, tokens_per_chunk: int = 1) -> Answer:
    """As many tokens as were asked for, at even times, an empty chunk before them and usage after them."""

    async def answer(request: web.Request, body: dict[str, Any], seen: Seen, request_id: str) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(b": a comment\n\n" + text_event(""))
        num_tokens = body["max_tokens"]
        for first in range(0, num_tokens, tokens_per_chunk):
            await asyncio.sleep(gap_s)
            is_last = first + tokens_per_chunk >= num_tokens
            seen.written_ns.setdefault(request_id, []).append(monotonic_ns())
            await response.write(text_event("x" * tokens_per_chunk, "length" if is_last else None))
        await response.write(usage_event(len(body["prompt"]), num_tokens, 16) + b"data: [DONE]\n\n")
        return response

    return answer


def after_all_have_come(number: int) -> Answer:
    """Nobody is answered before so many requests are there."""

    async def answer(request: web.Request, body: dict[str, Any], seen: Seen, request_id: str) -> web.StreamResponse:
        while len(seen.bodies) < number:
            await asyncio.sleep(0.01)
        return await streaming()(request, body, seen, request_id)

    return answer


def raw(data: bytes, cut: bool = False) -> Answer:
    """These bytes as the whole stream; ``cut``: then the connection breaks."""

    async def answer(request: web.Request, _body: dict[str, Any], _seen: Seen, _id: str) -> web.StreamResponse:
        response = await open_stream(request)
        await response.write(data)
        if cut:
            assert request.transport is not None
            request.transport.close()
        return response

    return answer


def refusing(status: int, content: Any, content_type: str = "application/json") -> Answer:
    async def answer(_request: web.Request, _body: dict[str, Any], _seen: Seen, _id: str) -> web.Response:
        text = content if isinstance(content, str) else json.dumps(content)
        return web.Response(status=status, text=text, content_type=content_type)

    return answer


@contextmanager
def scripted_server(
    answer: Answer, *, models: Any = None, api_key: str | None = None, probe: Answer | None = None
) -> Iterator[tuple[str, Seen]]:
    """Its address and what it sees. The client's probe is answered as it should be, unless told otherwise."""
    seen = Seen()
    app = _app(answer, models, api_key, probe or streaming(), seen)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    ports: list[int] = []
    is_up = threading.Event()

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
        await site.start()
        ports.append(runner.addresses[0][1])

    def run() -> None:
        loop.run_until_complete(start())
        is_up.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert is_up.wait(10), "the server did not start"
    try:
        yield f"http://127.0.0.1:{ports[0]}", seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def _app(answer: Answer, models: Any, api_key: str | None, probe: Answer, seen: Seen) -> web.Application:
    async def list_models(request: web.Request) -> web.Response:
        if api_key is not None and request.headers.get("Authorization") != f"Bearer {api_key}":
            return web.json_response({"error": {"message": "no", "code": 401}}, status=401)
        listed = {"object": "list", "data": [{"id": MODEL, "object": "model"}, {"id": "other", "object": "model"}]}
        return web.json_response(listed if models is None else models)

    async def complete(request: web.Request) -> web.StreamResponse:
        received_ns = monotonic_ns()
        request_id = request.headers["X-Request-Id"].rpartition("-")[2]
        body = await request.json()
        if request_id == "probe":
            return await probe(request, body, Seen(), request_id)
        seen.received_ns[request_id] = received_ns
        seen.bodies[request_id] = body
        seen.headers[request_id] = dict(request.headers)
        response = await answer(request, body, seen, request_id)
        seen.ended_ns[request_id] = monotonic_ns()
        return response

    app = web.Application(client_max_size=64 << 20)
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/completions", complete)
    return app

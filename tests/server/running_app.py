"""The application on a real port of this machine, for as long as a test needs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from sagellm.server.app import create_app, make_runner
from sagellm.server.app_settings import AppSettings
from sagellm.server.engine import Engine
from sagellm.server.prometheus.serving_metrics import ServingMetrics

SETTINGS = AppSettings(model_names=("toy", "toy-alias"), max_model_len=256, vocab_size=260, body_bytes_max=1 << 16)


@dataclass(frozen=True)
class Event:
    """One server-sent event: JSON, or the mark at the end."""

    data: bytes

    @property
    def is_done(self) -> bool:
        return self.data == b"[DONE]"

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.data)


@dataclass(frozen=True)
class Client:
    """A client of the running application."""

    url: str
    port: int
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        async with self.session.post(self.url + path, json=body, **options) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def get(self, path: str) -> tuple[int, bytes]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.read()

    async def events(self, path: str, body: Any, **options: Any) -> list[Event]:
        """All events of a stream, which must be well formed to the byte."""
        async with self.session.post(self.url + path, json=dict(body, stream=True), **options) as response:
            assert response.status == 200, await response.read()
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            return parsed_events(await response.read())


def parsed_events(raw: bytes) -> list[Event]:
    assert raw.endswith(b"\n\n")
    events = raw[:-2].split(b"\n\n")
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    return [Event(event[len(b"data: ") :]) for event in events]


@asynccontextmanager
async def running_app(
    engine: Engine, settings: AppSettings = SETTINGS, metrics: ServingMetrics | None = None
) -> AsyncIterator[Client]:
    """Serve, and give a client."""
    runner = make_runner(create_app(engine, settings, metrics))
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session:
            yield Client(f"http://127.0.0.1:{port}", port, session)
    finally:
        await runner.cleanup()

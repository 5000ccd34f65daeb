"""Clients that go, or stop reading: their requests end at once, and nothing else is touched."""

import asyncio
import json
import socket
from dataclasses import replace
from typing import Any

import pytest
from echo_engine import EchoEngine
from running_app import SETTINGS, Client, running_app

from sagellm.core.request import FinishReason


async def _until(condition: Any, wait_s: float = 30.0) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    while not condition():
        assert loop.time() - start_s < wait_s, "it did not happen"
        await asyncio.sleep(0.002)


async def _sent(client: Client, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    writer.write(head + raw)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("pause_s", [0.01, 60.0], ids=["decoding", "queued"])
def test_a_client_that_goes_ends_its_request_at_once(is_streamed: bool, num_choices: int, pause_s: float) -> None:
    async def test() -> None:
        engine = EchoEngine(pause_s=pause_s)
        async with running_app(engine, replace(SETTINGS, max_model_len=100_000)) as client:
            body = {"prompt": "abc", "max_tokens": 90_000, "stream": is_streamed, "n": num_choices}
            _, writer = await _sent(client, body)
            await _until(lambda: engine.num_unfinished == num_choices)
            writer.close()
            await _until(lambda: engine.num_unfinished == 0)  # long before it would have ended by itself
            assert [reason for _, reason in engine.cancelled] == [FinishReason.ABORT] * num_choices
            status, _ = await client.get("/health")
            assert status == 200

    asyncio.run(test())


def test_a_client_that_goes_while_the_writer_waits_for_it_ends_its_request() -> None:
    async def test() -> None:
        engine = EchoEngine(tokens_per_delta=500)
        async with running_app(engine, replace(SETTINGS, max_model_len=10**8)) as client:
            _, writer = await _sent(client, {"prompt": "abc", "max_tokens": 10**7, "stream": True})
            await _is_blocked(engine)
            writer.transport.abort()
            await _until(lambda: engine.num_unfinished == 0)
            assert [reason for _, reason in engine.cancelled] == [FinishReason.ABORT]

    asyncio.run(test())


async def _is_blocked(engine: EchoEngine) -> None:
    """Returns when no more tokens are taken: all buffers on the way to a client that does not read are full."""
    last = -1
    while engine.num_given != last:
        last = engine.num_given
        await asyncio.sleep(0.2)
    assert last > 0


def test_a_client_that_reads_nothing_is_given_up_and_holds_nobody_up() -> None:
    async def test() -> None:
        engine = EchoEngine(tokens_per_delta=500)
        settings = replace(SETTINGS, max_model_len=10**8, write_timeout_s=0.6)
        async with running_app(engine, settings) as client:
            with socket.create_connection(("127.0.0.1", client.port)) as slow:
                raw = json.dumps({"prompt": "abc", "max_tokens": 10**7, "stream": True}).encode()
                slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
                await _is_blocked(engine)
                num_given = engine.num_given
                status, answer = await client.post("/v1/completions", {"prompt": "abc", "max_tokens": 200})
                assert status == 200
                assert len(answer["choices"][0]["text"]) == 200
                await _until(lambda: engine.num_unfinished == 0)
                assert [reason for _, reason in engine.cancelled] == [FinishReason.ABORT]
                assert engine.num_given == num_given + 200

    asyncio.run(test())


def test_a_slow_reader_that_goes_on_reading_gets_everything() -> None:
    async def test() -> None:
        engine = EchoEngine(tokens_per_delta=500)
        async with running_app(engine, replace(SETTINGS, max_model_len=10**8, write_timeout_s=5)) as client:
            body = {"prompt": "abcdefgh", "max_tokens": 200_000, "stream": True}
            async with client.session.post(client.url + "/v1/completions", json=body) as response:
                await asyncio.sleep(0.5)
                raw = await response.read()
            assert raw.endswith(b"data: [DONE]\n\n")
            texts = [json.loads(line[6:])["choices"][0]["text"] for line in raw.split(b"\n\n")[:-2]]
            assert "".join(texts) == "abcdefgh" * 25_000

    asyncio.run(test())


def test_clients_that_go_in_any_moment_are_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    """Also in the moment between the end of the connection and the end of its handler."""

    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine, replace(SETTINGS, max_model_len=10**6)) as client:
            for number in range(60):
                body = {"prompt": "abc", "max_tokens": 10**5, "stream": True, "n": 1 + number % 2}
                reader, writer = await _sent(client, body)
                await reader.readuntil(b"data: ")
                await asyncio.sleep(number * 1e-4)
                if number % 3:
                    writer.transport.abort()
                else:
                    writer.close()
                await _until(lambda: engine.num_unfinished == 0)

    asyncio.run(test())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

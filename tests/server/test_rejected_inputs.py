"""Inputs that must be refused: status, OpenAI's error form, and an engine that never heard of them."""

import asyncio
from dataclasses import replace

import pytest
from bad_requests import BOTH, MESSAGES, all_refused, refused
from echo_engine import EchoEngine
from running_app import SETTINGS, running_app


def test_every_bad_field_is_refused_by_name() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            assert await all_refused(client, SETTINGS.max_model_len, SETTINGS.vocab_size) > 200
            assert engine.seen == []

    asyncio.run(test())


def test_limits_are_named_with_both_numbers() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            error = await refused(client, 400, BOTH[0], "max_tokens", json={"prompt": "x" * 200, "max_tokens": 57})
            assert "57" in error["message"]
            assert "257" in error["message"]
            assert "256" in error["message"]
            error = await refused(client, 400, BOTH[0], "prompt", json={"prompt": "x" * 300})
            assert "300" in error["message"]
            assert "256" in error["message"]

    asyncio.run(test())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00x"}',
        b"[" * 50_000,
        b'{"prompt": "x"} {}',
        b'{"prompt": "x", "temperature": Infinity}',
    ],
)
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            for path in (*BOTH, "/tokenize", "/detokenize"):
                await refused(client, 400, path, None, data=raw)
            assert engine.seen == []

    asyncio.run(test())


def test_paths_methods_and_models_that_do_not_exist() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            good = {"prompt": "x", "messages": MESSAGES}
            for path in BOTH:
                await refused(client, 404, path, "model", json={**good, "model": "gpt-9"})
                await refused(client, 405, path, None, method="GET")
            await refused(client, 404, "/v1/models/gpt-9", "model", method="GET")
            await refused(client, 405, "/health", None, method="DELETE")
            for path in (
                "/v1/embeddings",
                "/v1/responses",
                "/v1/messages",
                "/start_profile",
                "/v1/load_lora_adapter",
                "/x",
            ):
                await refused(client, 404, path, None, json=good)
            assert engine.seen == []

    asyncio.run(test())


def test_sizes_beyond_the_limits() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            await refused(client, 413, BOTH[0], None, json={"prompt": "x" * (1 << 16)})
            await refused(client, 431, BOTH[0], None, json={"prompt": "x"}, headers={"X-Long": "x" * 17_000})
            headers = {f"X-{number}": "x" * 1000 for number in range(20)}
            await refused(client, 431, BOTH[0], None, json={"prompt": "x"}, headers=headers)
            assert engine.seen == []

    asyncio.run(test())


@pytest.mark.parametrize(
    ("raw", "status"),
    [(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", b"431"), (b"\x16\x03\x01 hello\r\n\r\n", b"400")],
)
def test_what_is_not_http_gets_the_same_form(raw: bytes, status: bytes) -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(raw)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
        assert answer.split(b" ")[1] == status, answer
        assert b'{"error":{"message":' in answer
        assert b'"code":' + status in answer

    asyncio.run(test())


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"Content-Encoding: gzip\r\nContent-Length: 15", b'{"prompt": "x"}'),
        (b"Transfer-Encoding: chunked", b"zz\r\n{}\r\n"),
        (b"Content-Length: -5", b""),
        (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    ],
    ids=["not gzip", "not chunks", "negative length", "two lengths"],
)
def test_bodies_that_are_not_what_their_header_says(
    header: bytes, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n" + body)
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
            writer.close()
            assert answer.split(b" ")[1] == b"400", answer
            assert b'"code":400' in answer
            assert engine.seen == []

    asyncio.run(test())
    assert not [
        record for record in caplog.records if record.name.startswith("sagellm") and record.levelname == "ERROR"
    ]


def test_keys_are_asked_for() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine, replace(SETTINGS, api_keys=("one", "two"))) as client:
            for header in (
                {},
                {"Authorization": "one"},
                {"Authorization": "Bearer three"},
                {"Authorization": "Basic one"},
            ):
                for path in (*BOTH, "/tokenize", "/v1/nothing"):
                    await refused(client, 401, path, None, json={"prompt": "x"}, headers=header)
            assert engine.seen == []
            for key in ("one", "two"):
                headers = {"Authorization": f"Bearer {key}"}
                status, _ = await client.post(BOTH[0], {"prompt": "x"}, headers=headers)
                assert status == 200
            for path in ("/health", "/metrics", "/version"):
                assert (await client.get(path))[0] == 200

    asyncio.run(test())


def test_a_full_queue_and_a_server_that_stops_say_when_to_come_back() -> None:
    async def test() -> None:
        engine = EchoEngine(queue_max=0)
        async with running_app(engine, replace(SETTINGS, retry_after_s=7)) as client:
            for stream in (False, True):
                body = {"prompt": "x", "stream": stream}
                await refused(client, 429, BOTH[0], None, json=body)
                async with client.session.post(client.url + BOTH[0], json=body) as response:
                    assert response.headers["Retry-After"] == "7"
            engine.is_draining = True
            await refused(client, 503, BOTH[1], None, json={"messages": MESSAGES})
            engine.is_draining, engine.is_alive = False, False
            await refused(client, 503, BOTH[1], None, json={"messages": MESSAGES})
            assert engine.num_unfinished == 0

    asyncio.run(test())


def test_a_name_may_be_used_twice_at_a_time() -> None:
    async def test() -> None:
        engine = EchoEngine(pause_s=0.02)
        async with running_app(engine) as client:
            bodies = [{"prompt": "abc", "max_tokens": 5, "request_id": "mine", "n": n} for n in (1, 1, 2)]
            bodies.append({"prompt": "abc", "max_tokens": 5, "request_id": "mine-0"})
            answers = await asyncio.gather(*(client.post(BOTH[0], body) for body in bodies))
            assert [answer["id"] for _, answer in answers] == ["cmpl-mine"] * 3 + ["cmpl-mine-0"]
            assert len({spec.request_id for spec in engine.seen}) == 5

    asyncio.run(test())


def test_unknown_fields_are_ignored_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            for _ in range(3):
                status, _ = await client.post(
                    BOTH[0], {"prompt": "x", "top_secret": {"a": 1}, "user": "u", "vllm_xargs": {}}
                )
                assert status == 200

    asyncio.run(test())
    assert [record.getMessage() for record in caplog.records if "top_secret" in record.getMessage()] == [
        'requests have a field "top_secret", which is not known and is ignored'
    ]

"""Inputs that must be refused: status, OpenAI's error form, and an engine that never heard of them."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from echo_engine import EchoEngine
from running_app import SETTINGS, Client, running_app

_MESSAGES = [{"role": "user", "content": "x"}]
_BOTH = "/v1/completions", "/v1/chat/completions"
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}

# Fields that are added to a good request of both kinds, and the field that the error names.
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(({"max_tokens": value}, "max_tokens") for value in (0, -1, True, 1.5, 1e18, "7", 257, 10**30)),
    *(({"min_tokens": value}, "min_tokens") for value in (-1, 1.5, 257)),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    *(({"temperature": value}, "temperature") for value in (-0.1, 2.01, "1", True)),
    *(({"top_p": value}, "top_p") for value in (0, -0.5, 1.01)),
    *(({"top_k": value}, "top_k") for value in (-2, 1.5)),
    *(({"min_p": value}, "min_p") for value in (-0.1, 1.1)),
    *(({"repetition_penalty": value}, "repetition_penalty") for value in (0, -1)),
    *(({"presence_penalty": value}, "presence_penalty") for value in (-2.1, 2.1)),
    *(({"frequency_penalty": value}, "frequency_penalty") for value in (-2.1, 2.1)),
    *(({"n": value}, "n") for value in (0, -1, 129, 1.5, 10**9)),
    *(({"stop": value}, "stop") for value in ("", ["a", ""], ["x"] * 17, [1], 7)),
    *(({"stop_token_ids": value}, "stop_token_ids") for value in ([-1], [260], ["a"], 5)),
    *(({"allowed_token_ids": value}, "allowed_token_ids") for value in ([-1], [260], [])),
    *(({"bad_words": value}, "bad_words") for value in ([""], [" "], "x", [1])),
    *(({"logit_bias": value}, "logit_bias") for value in ({"260": 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": -100.5})),
    *(({"logit_bias": value}, "logit_bias") for value in ({"1": "a"}, [1], {"1" * 30: 1})),
    *(({"seed": value}, "seed") for value in (1.5, "a", 2**63)),
    *(({"priority": value}, "priority") for value in (1.5, 2**31)),
    *(({"cache_salt": value}, "cache_salt") for value in ("", "x" * 1025, 7)),
    *(({"request_id": value}, "request_id") for value in ("", "a\nb", "x" * 257, 7, "é")),
    *(({"truncate_prompt_tokens": value}, "truncate_prompt_tokens") for value in (0, -2, 257)),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"model": 7}, "model"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_regex": "a+"}, "guided_regex"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"use_beam_search": True}, "use_beam_search"),
    # Forged hand-overs: nothing in them is ever looked up or connected to.
    (
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1", "remote_port": 1}},
        "kv_transfer_params",
    ),
    ({"kv_transfer_params": {"remote_engine_id": "x", "remote_block_ids": [10**9]}}, "kv_transfer_params"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    *(({"prompt": value}, "prompt") for value in (None, "", [], [[]], [""], ["a", ""], 7, {"a": 1}, True)),
    *(
        ({"prompt": value}, "prompt")
        for value in ([-1], [260], [[1], [260]], [1, "a"], ["a", [1]], [1, [1]], [True, 1])
    ),
    *(({"prompt": value}, "prompt") for value in ([1.0], [None], [[1.5]], ["x"] * 1025)),
    ({"prompt": "x" * 256}, "prompt"),
    ({"prompt": [1] * 300}, "prompt"),
    ({"prompt": "x" * 200, "max_tokens": 57}, "max_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"prompt": ["x"] * 9, "n": 128}, "n"),
    *(({"logprobs": value}, "logprobs") for value in (-1, 21, True, 1.5)),
    *(({"best_of": value}, "best_of") for value in (0, 2)),
    ({"suffix": "end"}, "suffix"),
    ({"echo": True, "logprobs": 1}, "echo"),
]
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    *(({"messages": value}, "messages") for value in (None, [], "hi", [7], [{}], {"role": "user"})),
    *(({"messages": [{"role": role, "content": "x"}]}, "messages") for role in ("wizard", None, 7, "")),
    *(({"messages": [{"role": "user", "content": value}]}, "messages") for value in (None, 7, {"text": "x"})),
    *(({"messages": [{"role": "user", "content": [part]}]}, "messages") for part in ("x", {"type": "text"}, 7)),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 256}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}, "tool_choice"),
    ({"chat_template": "{{ 7 }}"}, "chat_template"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"modalities": ["audio"]}, "modalities"),
]


async def refused(client: Client, status: int, path: str, param: str | None, **options: Any) -> dict[str, Any]:
    """Send what must be refused, and check the error's form."""
    method = options.pop("method", "POST")
    async with client.session.request(method, client.url + path, **options) as response:
        body = await response.json()
        assert response.status == status, (options, body)
        assert response.headers["X-Request-Id"]
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (status, _TYPES[status]), (options, error)
    assert error["param"] == param, (options, error)
    assert 10 < len(error["message"]) < 400
    return error


def test_every_bad_field_is_refused_by_name() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            for path in _BOTH:
                good = {"prompt": "x"} if path == "/v1/completions" else {"messages": _MESSAGES}
                for fields, param in BAD_FIELDS + (BAD_COMPLETIONS if "prompt" in good else BAD_CHATS):
                    error = await refused(client, 400, path, param, json={**good, **fields})
                    if param != "messages":
                        assert param in error["message"]
            assert engine.seen == []

    asyncio.run(test())


def test_limits_are_named_with_both_numbers() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            error = await refused(client, 400, _BOTH[0], "max_tokens", json={"prompt": "x" * 200, "max_tokens": 57})
            assert "57" in error["message"]
            assert "257" in error["message"]
            assert "256" in error["message"]
            error = await refused(client, 400, _BOTH[0], "prompt", json={"prompt": "x" * 300})
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
            for path in (*_BOTH, "/tokenize", "/detokenize"):
                await refused(client, 400, path, None, data=raw)
            assert engine.seen == []

    asyncio.run(test())


def test_paths_methods_and_models_that_do_not_exist() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            good = {"prompt": "x", "messages": _MESSAGES}
            for path in _BOTH:
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
            await refused(client, 413, _BOTH[0], None, json={"prompt": "x" * (1 << 16)})
            await refused(client, 431, _BOTH[0], None, json={"prompt": "x"}, headers={"X-Long": "x" * 17_000})
            headers = {f"X-{number}": "x" * 1000 for number in range(20)}
            await refused(client, 431, _BOTH[0], None, json={"prompt": "x"}, headers=headers)
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
                for path in (*_BOTH, "/tokenize", "/v1/nothing"):
                    await refused(client, 401, path, None, json={"prompt": "x"}, headers=header)
            assert engine.seen == []
            for key in ("one", "two"):
                headers = {"Authorization": f"Bearer {key}"}
                status, _ = await client.post(_BOTH[0], {"prompt": "x"}, headers=headers)
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
                await refused(client, 429, _BOTH[0], None, json=body)
                async with client.session.post(client.url + _BOTH[0], json=body) as response:
                    assert response.headers["Retry-After"] == "7"
            engine.is_draining = True
            await refused(client, 503, _BOTH[1], None, json={"messages": _MESSAGES})
            engine.is_draining, engine.is_alive = False, False
            await refused(client, 503, _BOTH[1], None, json={"messages": _MESSAGES})
            assert engine.num_unfinished == 0

    asyncio.run(test())


def test_a_name_may_be_used_twice_at_a_time() -> None:
    async def test() -> None:
        engine = EchoEngine(pause_s=0.02)
        async with running_app(engine) as client:
            bodies = [{"prompt": "abc", "max_tokens": 5, "request_id": "mine", "n": n} for n in (1, 1, 2)]
            bodies.append({"prompt": "abc", "max_tokens": 5, "request_id": "mine-0"})
            answers = await asyncio.gather(*(client.post(_BOTH[0], body) for body in bodies))
            assert [answer["id"] for _, answer in answers] == ["cmpl-mine"] * 3 + ["cmpl-mine-0"]
            assert len({spec.request_id for spec in engine.seen}) == 5

    asyncio.run(test())


def test_unknown_fields_are_ignored_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            for _ in range(3):
                status, _ = await client.post(
                    _BOTH[0], {"prompt": "x", "top_secret": {"a": 1}, "user": "u", "vllm_xargs": {}}
                )
                assert status == 200

    asyncio.run(test())
    assert [record.getMessage() for record in caplog.records if "top_secret" in record.getMessage()] == [
        'requests have a field "top_secret", which is not known and is ignored'
    ]

"""Everything beside generation: what probes, routers and benchmark tools ask."""

import asyncio
import re
from typing import Any

import msgspec
import pytest
from echo_engine import EchoEngine
from running_app import Client, running_app

from sagellm import __version__


def test_models_are_listed() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            _, raw = await client.get("/v1/models")
            models = msgspec.json.decode(raw)
            assert models["object"] == "list"
            assert [model["id"] for model in models["data"]] == ["toy", "toy-alias"]
            for model in models["data"]:
                assert {"object", "created", "owned_by", "root", "parent", "max_model_len", "permission"} <= set(model)
                assert (model["object"], model["root"], model["max_model_len"]) == ("model", "toy", 256)
            _, raw = await client.get("/v1/models/toy-alias")
            assert msgspec.json.decode(raw) == models["data"][1]

    asyncio.run(test())


def test_probes() -> None:
    async def test() -> None:
        engine = EchoEngine(pause_s=60)
        async with running_app(engine) as client:
            assert await client.get("/health") == (200, b"")
            assert await client.get("/ping") == (200, b"")
            assert msgspec.json.decode((await client.get("/version"))[1]) == {"version": __version__}
            waiting = asyncio.ensure_future(client.post("/v1/completions", {"prompt": "x"}))
            await asyncio.sleep(0.1)
            assert msgspec.json.decode((await client.get("/load"))[1]) == {"server_load": 1}
            waiting.cancel()
            engine.is_alive = False
            assert (await client.get("/health"))[0] == 503

    asyncio.run(test())


def test_tokens_of_a_prompt_and_of_a_conversation_and_back() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            _, tokenized = await client.post("/tokenize", {"model": "toy", "prompt": "hé", "add_special_tokens": False})
            assert tokenized == {"count": 3, "max_model_len": 256, "tokens": [104, 195, 169], "token_strs": None}
            _, tokenized = await client.post("/tokenize", {"prompt": "é", "return_token_strs": True})
            assert tokenized["token_strs"] == ["<0xC3>", "<0xA9>"]
            _, tokenized = await client.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]})
            _, text = await client.post("/detokenize", {"model": "toy", "tokens": tokenized["tokens"]})
            assert text == {"prompt": "user: x\nassistant:"}
            assert (await client.post("/detokenize", {"tokens": []}))[1] == {"prompt": ""}

    asyncio.run(test())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 7}, "prompt"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": ""}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_bad_token_requests_are_refused(path: str, body: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            status, answer = await client.post(path, body)
            assert (status, answer["error"]["param"]) == (400, param)

    asyncio.run(test())


def test_request_ids_go_in_and_out() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            for is_streamed in (False, True):
                headers = {"X-Request-Id": f"bench-1-{is_streamed}"}
                body = {"prompt": "x", "max_tokens": 1, "stream": is_streamed}
                async with client.session.post(client.url + "/v1/completions", json=body, headers=headers) as response:
                    assert response.headers["X-Request-Id"] == headers["X-Request-Id"]
                    await response.read()
                assert engine.seen[-1].request_id.startswith(f"cmpl-{headers['X-Request-Id']}-")
            async with client.session.get(client.url + "/version") as response:
                assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-Id"])
            status, answer = await client.post("/v1/completions", {"prompt": "x"}, headers={"X-Request-Id": "é"})
            assert status == 400
            assert answer["error"]["param"] == "X-Request-Id"

    asyncio.run(test())


# What `vllm bench serve` sends, and what its own flags add.
_BENCH_COMPLETION = {
    "model": "toy",
    "prompt": "Once upon a time",
    "repetition_penalty": 1.0,
    "max_tokens": 16,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "temperature": 0.0,
    "top_k": -1,
}
_BENCH_CHAT = {
    "model": "toy",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}],
    "max_completion_tokens": 16,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.0,
    "ignore_eos": True,
}


async def _bench_client(client: Client, path: str, payload: dict[str, Any]) -> tuple[str, int, int]:
    """Reads as that tool does: text, output tokens by usage, and chunks that have choices."""
    text, num_tokens, num_chunks = "", 0, 0
    async with client.session.post(
        client.url + path, json=payload, headers={"x-request-id": "bench-ab12-0", "Authorization": "Bearer None"}
    ) as response:
        assert response.status == 200
        async for line in response.content:
            line = line.strip()
            if not line or line.startswith(b":"):
                continue
            chunk = line.removeprefix(b"data: ")
            if chunk == b"[DONE]":
                continue
            data = msgspec.json.decode(chunk)
            if choices := data.get("choices"):
                num_chunks += 1
                text += choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""
            elif usage := data.get("usage"):
                num_tokens = usage.get("completion_tokens")
    return text, num_tokens, num_chunks


def test_the_benchmark_of_vllm_is_served_as_it_asks() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            found = await _bench_client(client, "/v1/completions", _BENCH_COMPLETION)
            assert found == ("Once upon a time", 16, 16)
            text, num_tokens, num_chunks = await _bench_client(client, "/v1/chat/completions", _BENCH_CHAT)
            assert (text, num_tokens, num_chunks) == ("user: Once upon ", 16, 17)
            for spec in engine.seen:
                assert spec.max_output_tokens == 16
                assert spec.stop_token_ids == ()
                assert spec.sampling is not None
                assert (spec.sampling.temperature, spec.sampling.top_k) == (0.0, 0)

    asyncio.run(test())


def test_wishes_reach_the_core() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            body = {
                "prompt": [1, 2, 3, 4],
                "truncate_prompt_tokens": 2,
                "max_tokens": 5,
                "min_tokens": 2,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 7,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.2,
                "frequency_penalty": -0.3,
                "seed": -5,
                "logit_bias": {"7": 1.5},
                "allowed_token_ids": [1, 2],
                "bad_words": ["ab"],
                "stop_token_ids": [9],
                "priority": -3,
                "cache_salt": "tenant",
                "logprobs": 0,
            }
            status, _ = await client.post("/v1/completions", body)
            assert status == 200
        (spec,) = engine.seen
        assert spec.prompt_token_ids == (3, 4)
        assert (spec.max_output_tokens, spec.priority, spec.cache_salt) == (5, -3, "tenant")
        assert spec.stop_token_ids == (256, 9)
        sampling = msgspec.structs.asdict(spec.sampling)
        assert sampling == {
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": -0.3,
            "seed": -5,
            "min_tokens": 2,
            "logit_bias": ((7, 1.5),),
            "allowed_token_ids": (1, 2),
            "bad_words": ((97, 98), (32, 97, 98)),
            "num_logprobs": 0,
        }

    asyncio.run(test())


def test_output_limits_where_none_are_given() -> None:
    """16 for completions, as OpenAI has it; for chat all that is left."""

    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            await client.post("/v1/completions", {"prompt": "x" * 10})
            await client.post("/v1/completions", {"prompt": "x" * 250})
            await client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
            num_prompt_tokens = len("user: x\nassistant:")
            assert [spec.max_output_tokens for spec in engine.seen] == [16, 6, 256 - num_prompt_tokens]

    asyncio.run(test())


def test_long_prompts_are_encoded_beside_the_event_loop() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            status, answer = await client.post("/tokenize", {"prompt": "ab" * 10_000})
            assert status == 200
            assert answer["count"] == 20_000

    asyncio.run(test())

"""Server-sent events: what comes in which order, and what is the same with and without a stream."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from echo_engine import EchoEngine
from running_app import Client, Event, running_app

from sagellm.core.request import FinishReason
from sagellm.server.engine import Refusal, RequestOutcome

_CHAT = {"model": "toy", "messages": [{"role": "user", "content": [{"type": "text", "text": "Grüße"}]}]}
_COMPLETION = {"model": "toy", "prompt": "héllo wörld"}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20))


def _choices(events: list[Event], index: int = 0) -> list[dict[str, Any]]:
    chosen = [each for event in events if not event.is_done for each in event.json["choices"]]
    return [each for each in chosen if each["index"] == index]


def _chat_text(events: list[Event], index: int = 0) -> str:
    return "".join(each["delta"].get("content", "") for each in _choices(events, index))


def _text(events: list[Event], index: int = 0) -> str:
    return "".join(each["text"] for each in _choices(events, index))


@pytest.mark.parametrize("tokens_per_delta", [1, 3])
def test_a_chat_stream_has_role_text_finish_usage_and_done_in_that_order(tokens_per_delta: int) -> None:
    async def test() -> None:
        engine = EchoEngine(tokens_per_delta=tokens_per_delta, num_cached_tokens=4)
        async with running_app(engine) as client:
            body = {**_CHAT, "max_completion_tokens": 12, "stream_options": {"include_usage": True}}
            events = await client.events("/v1/chat/completions", body)
        *chunks, usage, done = events
        assert done.is_done
        assert not any(event.is_done for event in chunks)
        assert chunks[0].json["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[0].json["choices"][0]["finish_reason"] is None
        assert all("role" not in each["delta"] for each in _choices(chunks)[1:])
        assert [each["finish_reason"] for each in _choices(chunks)][-2:] == [None, "length"]
        assert _chat_text(chunks) == "user: Grüß"
        assert all(not event.json.get("usage") for event in chunks)
        assert usage.json["choices"] == []
        num_prompt_tokens = len("user: Grüße\nassistant:".encode())
        assert usage.json["usage"] == {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": 12,
            "total_tokens": num_prompt_tokens + 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert len({(event.json["id"], event.json["created"], event.json["model"]) for event in events[:-1]}) == 1
        assert {event.json["object"] for event in events[:-1]} == {"chat.completion.chunk"}
        assert events[0].json["id"].startswith("chatcmpl-")

    run(test())


def test_the_role_is_not_sent_before_there_is_a_token() -> None:
    """Else a client would measure a time to first token that nobody has."""

    async def test() -> None:
        engine = EchoEngine(pause_s=0.3)
        async with running_app(engine) as client:
            start_s = asyncio.get_running_loop().time()
            body = {**_CHAT, "max_tokens": 2, "stream": True}
            async with client.session.post(client.url + "/v1/chat/completions", json=body) as response:
                first = await response.content.readuntil(b"\n\n")
                assert asyncio.get_running_loop().time() - start_s > 0.25
                assert b'"role":"assistant"' in first

    run(test())


def test_a_completion_stream_says_what_the_whole_answer_says() -> None:
    async def test() -> None:
        async with running_app(EchoEngine(tokens_per_delta=2)) as client:
            for wishes in ({}, {"stop": "w"}, {"echo": True}, {"n": 3}, {"prompt": ["ab", "cd"], "n": 2}):
                body = {**_COMPLETION, "max_tokens": 9, "seed": 5, **wishes}
                status, whole = await client.post("/v1/completions", body)
                assert status == 200
                events = await client.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
                for choice in whole["choices"]:
                    index = choice["index"]
                    assert _text(events, index) == choice["text"]
                    assert _choices(events, index)[-1]["finish_reason"] == choice["finish_reason"]
                    assert _choices(events, index)[-1]["stop_reason"] == choice["stop_reason"]
                assert events[-2].json["usage"] == whole["usage"]
                assert events[-1].is_done

    run(test())


def test_continuous_usage_counts_up() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = await client.events("/v1/completions", {**_COMPLETION, "max_tokens": 4, "stream_options": options})
            counts = [event.json["usage"]["completion_tokens"] for event in events[:-1]]
            assert counts == [1, 2, 3, 4, 4]

    run(test())


def test_without_stream_options_no_usage_is_sent() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            events = await client.events("/v1/completions", {**_COMPLETION, "max_tokens": 4})
            assert not any(b"usage" in event.data for event in events)
            assert len(_choices(events)) == 4

    run(test())


def test_choices_of_one_prompt_come_side_by_side_with_seeds_of_their_own() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            events = await client.events("/v1/chat/completions", {**_CHAT, "max_tokens": 5, "n": 3, "seed": 41})
            order = [event.json["choices"][0]["index"] for event in events[:-1]]
            assert order != sorted(order)
            assert sorted(set(order)) == [0, 1, 2]
            for index in range(3):
                assert _choices(events, index)[0]["delta"] == {"role": "assistant", "content": ""}
                assert _choices(events, index)[-1]["finish_reason"] == "length"
            assert [spec.sampling.seed for spec in engine.seen if spec.sampling] == [41, 42, 43]
            assert len({spec.request_id for spec in engine.seen}) == 3

    run(test())


def test_unseeded_requests_get_seeds_that_differ() -> None:
    async def test() -> None:
        engine = EchoEngine()
        async with running_app(engine) as client:
            for _ in range(20):
                await client.post("/v1/completions", {**_COMPLETION, "max_tokens": 1})
            assert len({spec.sampling.seed for spec in engine.seen if spec.sampling}) == 20

    run(test())


@pytest.mark.parametrize(
    ("stop", "include", "text"),
    [("lo w", False, "hél"), ("lo w", True, "héllo w"), (["zz", "ö"], False, "héllo w"), ("ldhé", False, "héllo wör")],
)
def test_stop_strings_end_an_answer_across_tokens(stop: str | list[str], include: bool, text: str) -> None:
    async def test() -> None:
        for tokens_per_delta in (1, 2, 7, 50):
            engine = EchoEngine(tokens_per_delta=tokens_per_delta)
            async with running_app(engine) as client:
                body = {**_COMPLETION, "max_tokens": 100, "stop": stop, "include_stop_str_in_output": include}
                events = await client.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
                assert _text(events) == text
                last = _choices(events)[-1]
                assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop if isinstance(stop, str) else "ö")
                found = stop if isinstance(stop, str) else "ö"
                num_tokens = len((text if include else text + found).encode())
                assert events[-2].json["usage"]["completion_tokens"] == num_tokens
                assert [reason for _, reason in engine.cancelled] in ([FinishReason.STOP], [])
                assert engine.num_unfinished == 0

    run(test())


def test_stop_strings_count_only_after_min_tokens() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            body = {"prompt": "ab", "max_tokens": 20, "min_tokens": 5, "stop": "b"}
            _, answer = await client.post("/v1/completions", body)
            assert answer["choices"][0]["text"] == "ababa"

    run(test())


@pytest.mark.parametrize(
    ("wishes", "text", "reason"),
    [
        ({}, "ab", None),
        ({"ignore_eos": True}, "abcabc", None),
        ({"stop_token_ids": [98]}, "a", 98),
        ({"stop_token_ids": [98], "include_stop_str_in_output": True}, "ab", 98),
        ({"stop_token_ids": [98], "stop": "zzz"}, "a", 98),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "ab<|end|>", None),
    ],
)
def test_stop_tokens_end_an_answer_and_are_not_shown(wishes: dict[str, Any], text: str, reason: int | None) -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            body = {"prompt": [97, 98, 256, 99], "max_tokens": 8, **wishes}
            _, answer = await client.post("/v1/completions", body)
            choice = answer["choices"][0]
            assert choice["text"] == text
            assert choice["stop_reason"] == reason
            assert choice["finish_reason"] == ("length" if wishes.get("ignore_eos") else "stop")

    run(test())


async def _logprobs(client: Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the whole answer, and of the stream's chunks."""
    _, whole = await client.post(path, body)
    events = await client.events(path, body)
    return [whole["choices"][0]["logprobs"], *(each.get("logprobs") or {} for each in _choices(events))]


def test_log_probabilities_in_the_form_of_completions() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            whole, *chunks = await _logprobs(
                client, "/v1/completions", {"prompt": "ab", "max_tokens": 3, "logprobs": 2}
            )
            assert whole == {
                "tokens": ["a", "b", "a"],
                "token_logprobs": [-0.5, -0.5, -0.5],
                "top_logprobs": [{"a": -0.5, "b": -9999.0}, {"b": -0.5, "c": -9999.0}, {"a": -0.5, "b": -9999.0}],
                "text_offset": [0, 1, 2],
            }
            for key, values in whole.items():
                assert [value for chunk in chunks for value in chunk[key]] == values

    run(test())


def test_log_probabilities_in_the_form_of_chat() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            body = {**_CHAT, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
            whole, role, *chunks = await _logprobs(client, "/v1/chat/completions", body)
            top = {"token": "u", "logprob": -9999.0, "bytes": [117]}
            assert whole["content"][0] == {"token": "u", "logprob": -0.5, "bytes": [117], "top_logprobs": [top]}
            assert role == {}
            assert [each for chunk in chunks for each in chunk["content"]] == whole["content"]
            _, answer = await client.post("/v1/chat/completions", {**body, "return_tokens_as_token_ids": True})
            assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:117"

    run(test())


def test_token_ids_are_given_where_asked_for() -> None:
    async def test() -> None:
        async with running_app(EchoEngine()) as client:
            body = {"prompt": "ab", "max_tokens": 3, "return_token_ids": True}
            _, whole = await client.post("/v1/completions", body)
            assert whole["choices"][0]["token_ids"] == [97, 98, 97]
            assert whole["choices"][0]["prompt_token_ids"] == [97, 98]
            chunks = _choices(await client.events("/v1/completions", body))
            assert [each.get("prompt_token_ids") for each in chunks] == [[97, 98], None, None]
            assert [token for each in chunks for token in each["token_ids"]] == [97, 98, 97]
            _, chat = await client.post("/v1/chat/completions", {**_CHAT, "max_tokens": 2, "return_token_ids": True})
            assert chat["prompt_token_ids"][:2] == [117, 115]
            assert chat["choices"][0]["token_ids"] == [117, 115]

    run(test())


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_failing_model_is_an_error_and_never_a_silent_cut(num_tokens: int) -> None:
    async def test() -> None:
        engine = EchoEngine(ends_after=num_tokens)
        async with running_app(engine) as client:
            body = {**_COMPLETION, "max_tokens": 10, "stream": True, "n": 2}
            if num_tokens == 0:
                status, answer = await client.post("/v1/completions", body)
                assert status == 500
                assert answer["error"]["type"] == "InternalServerError"
            else:
                *chunks, error, done = await client.events("/v1/completions", body)
                assert done.is_done
                assert error.json["error"]["code"] == 500
                assert "made to fail" in error.json["error"]["message"]
                assert all("choices" in event.json for event in chunks)
            assert engine.num_unfinished == 0

    run(test())


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize(
    ("refusal", "status"), [(Refusal.IMPOSSIBLE, 400), (Refusal.QUEUE_FULL, 429), (Refusal.UNAVAILABLE, 503)]
)
def test_a_refusal_is_worded_alike_before_and_in_an_answer(refusal: Refusal, status: int, num_tokens: int) -> None:
    async def test() -> None:
        engine = EchoEngine(ends_after=num_tokens, outcome=RequestOutcome(None, "so it is", refusal))
        async with running_app(engine) as client:
            answered, answer = await client.post("/v1/completions", {**_COMPLETION, "max_tokens": 10})
            assert (answered, answer["error"]["code"]) == (status, status)
            body = {**_COMPLETION, "max_tokens": 10, "stream": True}
            if num_tokens:
                *_, error, done = await client.events("/v1/completions", body)
                assert done.is_done
                assert error.json["error"]["code"] == status
                assert "so it is" in error.json["error"]["message"]
            else:
                assert (await client.post("/v1/completions", body))[0] == status

    run(test())


def test_a_server_that_stops_says_so_to_those_whom_it_cuts_off() -> None:
    async def test() -> None:
        engine = EchoEngine(ends_after=2, pause_s=0.1, outcome=RequestOutcome(FinishReason.ABORT))
        async with running_app(engine) as client:
            async with client.session.post(
                client.url + "/v1/completions", json={**_COMPLETION, "max_tokens": 10, "stream": True}
            ) as response:
                await response.content.readuntil(b"\n\n")
                engine.is_draining = True
                rest = await response.read()
            assert b'"code":503' in rest
            assert rest.endswith(b"data: [DONE]\n\n")

    run(test())


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("num_choices", [1, 2])
def test_an_error_that_nobody_expected_ends_its_request_only(num_tokens: int, num_choices: int) -> None:
    async def test() -> None:
        engine = EchoEngine(pause_s=0.01)
        async with running_app(engine) as client:
            others = asyncio.ensure_future(client.post("/v1/completions", {"prompt": "ab", "max_tokens": 30}))
            while not engine.running:
                await asyncio.sleep(0.001)
            engine.breaks_after = num_tokens
            body = {"prompt": "ab", "max_tokens": 9, "stream": True, "n": num_choices}
            async with client.session.post(client.url + "/v1/completions", json=body) as response:
                raw = await response.read()
            assert response.status == (200 if num_tokens else 500)
            assert raw.endswith(b"data: [DONE]\n\n") == bool(num_tokens)
            assert b'"type":"InternalServerError"' in raw
            assert b"made to break" not in raw  # what is inside stays inside
            status, answer = await others
            assert (status, answer["choices"][0]["text"]) == (200, "ab" * 15)

    asyncio.run(test())

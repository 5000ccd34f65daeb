"""Requests that must be refused by a server of any context length (``most``) and vocabulary, and how."""

from typing import Any

from running_app import Client

BadFields = tuple[dict[str, Any], str]
"""Fields that spoil a good request, and the one that the error names."""

MESSAGES = [{"role": "user", "content": "x"}]
BOTH = "/v1/completions", "/v1/chat/completions"
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}


def bad_fields(most: int, vocab_size: int) -> list[BadFields]:
    """Of both kinds of request."""
    return [
        *(({"max_tokens": value}, "max_tokens") for value in (0, -1, True, 1.5, 1e18, "7", most + 1, 10**30)),
        *(({"min_tokens": value}, "min_tokens") for value in (-1, 1.5, most + 1)),
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
        *(({"stop_token_ids": value}, "stop_token_ids") for value in ([-1], [vocab_size], ["a"], 5)),
        *(({"allowed_token_ids": value}, "allowed_token_ids") for value in ([-1], [vocab_size], [])),
        *(({"bad_words": value}, "bad_words") for value in ([""], [" "], "x", [1])),
        *(
            ({"logit_bias": value}, "logit_bias")
            for value in ({str(vocab_size): 1}, {"-1": 1}, {"x": 1}, {"1": 101}, {"1": -100.5})
        ),
        *(({"logit_bias": value}, "logit_bias") for value in ({"1": "a"}, [1], {"1" * 30: 1})),
        *(({"seed": value}, "seed") for value in (1.5, "a", 2**63)),
        *(({"priority": value}, "priority") for value in (1.5, 2**31)),
        *(({"cache_salt": value}, "cache_salt") for value in ("", "x" * 1025, 7)),
        *(({"request_id": value}, "request_id") for value in ("", "a\nb", "x" * 257, 7, "é")),
        *(({"truncate_prompt_tokens": value}, "truncate_prompt_tokens") for value in (0, -2, most + 1)),
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


def bad_completions(most: int, vocab_size: int) -> list[BadFields]:
    """Of completions."""
    return [
        *(({"prompt": value}, "prompt") for value in (None, "", [], [[]], [""], ["a", ""], 7, {"a": 1}, True)),
        *(
            ({"prompt": value}, "prompt")
            for value in ([-1], [vocab_size], [[1], [vocab_size]], [1, "a"], ["a", [1]], [1, [1]], [True, 1])
        ),
        *(({"prompt": value}, "prompt") for value in ([1.0], [None], [[1.5]], ["x"] * 1025)),
        ({"prompt": "x" * most}, "prompt"),
        ({"prompt": [1] * (most + 44)}, "prompt"),
        ({"prompt": "x" * (most - 56), "max_tokens": 57}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"prompt": ["x"] * 9, "n": 128}, "n"),
        *(({"logprobs": value}, "logprobs") for value in (-1, 21, True, 1.5)),
        *(({"best_of": value}, "best_of") for value in (0, 2)),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
    ]


def bad_chats(most: int) -> list[BadFields]:
    """Of chats."""
    return [
        *(({"messages": value}, "messages") for value in (None, [], "hi", [7], [{}], {"role": "user"})),
        *(({"messages": [{"role": role, "content": "x"}]}, "messages") for role in ("wizard", None, 7, "")),
        *(({"messages": [{"role": "user", "content": value}]}, "messages") for value in (None, 7, {"text": "x"})),
        *(({"messages": [{"role": "user", "content": [part]}]}, "messages") for part in ("x", {"type": "text"}, 7)),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": "x" * most}]}, "messages"),
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
    assert (error["code"], error["type"]) == (status, TYPES[status]), (options, error)
    assert error["param"] == param, (options, error)
    assert 10 < len(error["message"]) < 400
    return error


async def all_refused(client: Client, most: int, vocab_size: int) -> int:
    """Send every one of them; how many there were."""
    fields = bad_fields(most, vocab_size)
    rows = [({"prompt": "x"}, BOTH[0], each) for each in fields + bad_completions(most, vocab_size)]
    rows += [({"messages": MESSAGES}, BOTH[1], each) for each in fields + bad_chats(most)]
    for good, path, (spoilt, param) in rows:
        error = await refused(client, 400, path, param, json={**good, **spoilt})
        assert param in error["message"]
    return len(rows)

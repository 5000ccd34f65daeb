"""The body of one `/v1/completions` request of a replay."""

import msgspec

from sagellm.load_client.prompts import prompt_token_ids
from traces.request_trace import Trace


class StreamOptions(msgspec.Struct):
    """``continuous_usage_stats``, vLLM's extension, has the count of tokens come with every chunk.

    Without it, a token that has no text yet (a part of a character) could not be told from no token.
    """

    include_usage: bool = True
    continuous_usage_stats: bool = True


class CompletionRequest(msgspec.Struct, omit_defaults=True):
    """A stream of exactly ``max_tokens`` tokens, the most likely ones, whatever the model would like to end with.

    ``ignore_eos`` and ``priority`` are vLLM's extensions.
    """

    model: str
    prompt: list[int]
    max_tokens: int
    stream: bool
    stream_options: StreamOptions
    temperature: float
    ignore_eos: bool
    priority: int = 0


def completion_body(trace: Trace, index: int, model: str, nonce: str) -> bytes:
    """JSON for the trace's request of that number."""
    request = trace.requests[index]
    return encode_completion(
        model,
        prompt_token_ids(index, request, trace.content_block_size, nonce),
        request.num_output_tokens,
        request.priority,
    )


def encode_completion(model: str, prompt: list[int], max_tokens: int, priority: int = 0) -> bytes:
    return msgspec.json.encode(
        CompletionRequest(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            stream=True,
            stream_options=StreamOptions(),
            temperature=0.0,
            ignore_eos=True,
            priority=priority,
        )
    )

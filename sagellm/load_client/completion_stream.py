"""Sends one completion request and reads its stream, a time for each chunk."""

from collections.abc import Callable
from http import HTTPStatus

import aiohttp

from sagellm.load_client.answer import Answer
from sagellm.load_client.completion_chunk import DONE, error_text, parse_chunk
from sagellm.load_client.endpoint import Endpoint
from sagellm.load_client.event_stream import EventStreamParser, MalformedStreamError

REJECTIONS = (HTTPStatus.BAD_REQUEST, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
"""What says that the request is not served: not ever, or not now. It is never sent again."""

KEEP_ALIVE_S = 2.0
"""Servers close connections that were idle for some seconds (uvicorn after five). One that the server is about
to close must not be used again: the request would fail through no fault of the server."""

CONNECT_TIMEOUT_S = 30.0


def open_session(endpoint: Endpoint, timeout_s: float) -> aiohttp.ClientSession:
    """Connections without a limit to their number; each request may take so long from start to end."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(CONNECT_TIMEOUT_S, timeout_s)),
        headers={**endpoint.headers(), "Content-Type": "application/json"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


async def stream_completion(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    max_output_tokens: int,
    now_ns: Callable[[], int],
    request_id: str,
) -> Answer:
    """One request from start to end. All that goes wrong is in the answer."""
    answer = Answer(sent_ns=now_ns())
    is_done = False
    try:
        async with session.post(url, data=body, headers={"X-Request-Id": request_id}) as response:
            if response.status == HTTPStatus.OK:
                is_done = await _read_stream(response, answer, now_ns)
            else:
                await _read_refusal(response, answer)
    except TimeoutError:
        answer.failure = f"no end within {session.timeout.total:g} s"
    except MalformedStreamError as error:
        answer.failure = f"the server sent {error}"
    except (aiohttp.ClientError, OSError) as error:
        answer.failure = f"the connection failed ({_describe(error)})"
    answer.finish(now_ns(), max_output_tokens, is_done)
    return answer


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer, now_ns: Callable[[], int]) -> bool:
    """Whether the server said that it was done."""
    if response.content_type != "text/event-stream":
        raise MalformedStreamError(f"{response.content_type} where a stream of events was asked for")
    parser = EventStreamParser()
    async for received in response.content.iter_any():
        received_ns = now_ns()
        for data in parser.feed(received):
            if data == DONE:
                return True
            chunk = parse_chunk(data)
            if chunk.error_message is not None:
                answer.failure = f"the server reported: {chunk.error_message}"
                return False
            answer.take(chunk, received_ns)
    return False


async def _read_refusal(response: aiohttp.ClientResponse, answer: Answer) -> None:
    text = error_text(response.status, await response.content.read(4096))
    if response.status in REJECTIONS:
        answer.reject_reason = text
    else:
        answer.failure = f"the server answered {text}"


def _describe(error: Exception) -> str:
    """Without what differs from request to request, so that equal failures can be counted."""
    cause = getattr(error, "os_error", error)
    return getattr(cause, "strerror", None) or str(error) or type(error).__name__

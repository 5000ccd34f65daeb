"""Finds out, before the trace begins, that a server is there and serves what the replay will ask for."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus

import aiohttp
import msgspec

from sagellm.load_client.completion_chunk import error_text
from sagellm.load_client.completion_request import encode_completion
from sagellm.load_client.completion_stream import stream_completion
from sagellm.load_client.endpoint import Endpoint, ServerUnusableError
from sagellm.load_client.prompts import FIRST_TOKEN_ID

READY_WITHIN_S = 60.0  # for a server that says that it is not ready yet
ASK_AGAIN_S = 0.5
PROBE_TOKENS = 2


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def served_model(session: aiohttp.ClientSession, endpoint: Endpoint, wanted: str | None) -> str:
    """The model to ask for: the one that the user wants, or the first that the server has.

    Raises:
        ServerUnusableError: nobody listens, the key is wrong, or the model is not there.
    """
    names = await _model_names(session, endpoint)
    if wanted is None:
        return names[0]
    if wanted not in names:
        raise ServerUnusableError(f"{endpoint.base_url} does not serve {wanted!r}; it serves {', '.join(names)}")
    return wanted


async def probe(
    session: aiohttp.ClientSession, endpoint: Endpoint, model: str, now_ns: Callable[[], int], nonce: str
) -> None:
    """One tiny request of the very kind that follows. It also wakes up what a server does at the first one.

    Raises:
        ServerUnusableError: it was not answered as a replay needs it.
    """
    body = encode_completion(model, [FIRST_TOKEN_ID] * PROBE_TOKENS, PROBE_TOKENS)
    url = endpoint.url("/v1/completions")
    answer = await stream_completion(session, url, body, PROBE_TOKENS, now_ns, f"replay-{nonce}-probe")
    if not answer.is_complete:
        what = answer.reject_reason or answer.failure
        raise ServerUnusableError(
            f"{endpoint.base_url} lists {model} but did not serve a streamed completion of token ids ({what}); "
            "the server must offer OpenAI's /v1/completions"
        )


async def _model_names(session: aiohttp.ClientSession, endpoint: Endpoint) -> list[str]:
    url = endpoint.url("/v1/models")
    body = await _ask_until_ready(session, endpoint, url)
    try:
        names = [model.id for model in msgspec.json.decode(body, type=_Models).data]
    except msgspec.DecodeError as error:
        raise ServerUnusableError(
            f"{url}: the answer is no list of models; is this an OpenAI-compatible server?"
        ) from error
    if not names:
        raise ServerUnusableError(f"{url}: the server has no model")
    return names


async def _ask_until_ready(session: aiohttp.ClientSession, endpoint: Endpoint, url: str) -> bytes:
    loop = asyncio.get_running_loop()
    give_up_at_s = loop.time() + READY_WITHIN_S
    while True:
        status, body = await _get(session, endpoint, url)
        if status == HTTPStatus.OK:
            return body
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise ServerUnusableError(
                f"{endpoint.base_url} refuses the API key ({status}); give the right one as --api-key"
            )
        if status != HTTPStatus.SERVICE_UNAVAILABLE or loop.time() > give_up_at_s:
            raise ServerUnusableError(
                f"{url}: the server answered {error_text(status, body)}; is this an OpenAI-compatible server?"
            )
        await asyncio.sleep(ASK_AGAIN_S)


async def _get(session: aiohttp.ClientSession, endpoint: Endpoint, url: str) -> tuple[int, bytes]:
    try:
        async with session.get(url) as response:
            return response.status, await response.read()
    except TimeoutError as error:
        raise ServerUnusableError(f"{endpoint.base_url}: no answer in time; is the server up?") from error
    except aiohttp.ClientConnectorError as error:
        raise ServerUnusableError(
            f"{endpoint.base_url}: nobody listens there ({error.os_error.strerror or error.os_error}); "
            "start a server, such as `sagellm serve`, or check host and port"
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        raise ServerUnusableError(f"{endpoint.base_url}: no answer that is HTTP ({error})") from error

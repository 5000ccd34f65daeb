"""Server-sent events to one client, who may be slow, or gone."""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
from aiohttp import web

from sagellm.server.openai.errors import ApiError

_LOG = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_UNGUARDED_BYTES_MAX = 16 << 10  # well below what asyncio keeps for a client before writers must wait
_ENCODER = msgspec.json.Encoder()


class ClientGoneError(Exception):
    """The client closed its connection, or took nothing for as long as it may and was cut off."""


class EventStream:
    """One response of events, opened by the first. Every stream that is opened ends with ``[DONE]`` or is cut off."""

    __slots__ = ("_request", "_write_timeout_s", "response")

    def __init__(self, request: web.Request, write_timeout_s: float) -> None:
        self._request = request
        self._write_timeout_s = write_timeout_s
        # None until the client has been told that all is well: from then on errors are events, too.
        self.response: web.StreamResponse | None = None

    async def send(self, events: Sequence[msgspec.Struct]) -> None:
        """Send these together. Raises ClientGoneError where nobody takes them."""
        await self._write(b"".join([b"data: %b\n\n" % _ENCODER.encode(event) for event in events]))

    async def end(self, events: Sequence[msgspec.Struct] = ()) -> web.StreamResponse:
        """Send the last events and the mark that ends the stream."""
        return await self._write_last(b"".join([b"data: %b\n\n" % _ENCODER.encode(event) for event in events]))

    async def fail(self, error: ApiError) -> web.StreamResponse:
        """End the stream with an error."""
        return await self._write_last(b"data: %b\n\n" % error.encoded())

    async def _write_last(self, data: bytes) -> web.StreamResponse:
        response = await self._opened()
        await self._taken(response.write_eof(data + _DONE), may_wait=True)
        return response

    async def _write(self, data: bytes) -> None:
        response = await self._opened()
        transport = self._request.transport
        # Where the client has taken all so far, writing cannot have to wait, and a timer would cost more than it.
        may_wait = len(data) > _UNGUARDED_BYTES_MAX or transport is None or bool(transport.get_write_buffer_size())
        await self._taken(response.write(data), may_wait)

    async def _opened(self) -> web.StreamResponse:
        if self.response is None:
            self.response = web.StreamResponse(headers=_HEADERS)
            await self.response.prepare(self._request)
        return self.response

    async def _taken(self, writing: Coroutine[Any, Any, None], may_wait: bool) -> None:
        try:
            if may_wait:
                async with asyncio.timeout(self._write_timeout_s):
                    await writing
            else:
                await writing
        except TimeoutError as error:
            _LOG.warning("a client took nothing for %g s; its stream is cut off", self._write_timeout_s)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientGoneError from error
        except ConnectionError as error:
            raise ClientGoneError from error

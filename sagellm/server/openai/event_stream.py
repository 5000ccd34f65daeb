"""Server-sent events to one client, who may be slow, or gone."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from sagellm.server.openai.errors import ApiError

_LOG = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_UNGUARDED_BYTES_MAX = 16 << 10  # well below what asyncio keeps for a client before writers must wait
_ENCODER = msgspec.json.Encoder()


class ClientTooSlowError(Exception):
    """The client took nothing for as long as it may."""


class EventStream:
    """One response of events, opened by the first. Every stream that is opened ends with ``[DONE]`` or is cut off."""

    __slots__ = ("_request", "_response", "_write_timeout_s")

    def __init__(self, request: web.Request, write_timeout_s: float) -> None:
        self._request = request
        self._write_timeout_s = write_timeout_s
        self._response: web.StreamResponse | None = None

    @property
    def is_open(self) -> bool:
        """True once the client has been told that all is well: from then on errors are events, too."""
        return self._response is not None

    async def send(self, events: Sequence[msgspec.Struct]) -> None:
        """Send these together. Raises ClientTooSlowError after having cut the connection."""
        await self._write(b"".join([b"data: %b\n\n" % _ENCODER.encode(event) for event in events]))

    async def end(self, events: Sequence[msgspec.Struct] = ()) -> web.StreamResponse:
        """Send the last events and the mark that ends the stream."""
        return await self._write_last(b"".join([b"data: %b\n\n" % _ENCODER.encode(event) for event in events]))

    async def fail(self, error: ApiError) -> web.StreamResponse:
        """End the stream with an error."""
        return await self._write_last(b"data: %b\n\n" % error.encoded())

    async def _write_last(self, data: bytes) -> web.StreamResponse:
        response = self._response or await self._opened()
        async with self._given_up_after_timeout():
            await response.write_eof(data + _DONE)
        return response

    async def _write(self, data: bytes) -> None:
        response = self._response or await self._opened()
        transport = self._request.transport
        if len(data) <= _UNGUARDED_BYTES_MAX and transport is not None and not transport.get_write_buffer_size():
            # The client has taken all so far, so this cannot have to wait; a timer would cost more than the rest.
            await response.write(data)
            return
        async with self._given_up_after_timeout():
            await response.write(data)

    async def _opened(self) -> web.StreamResponse:
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(self._request)
        self._response = response
        return response

    @asynccontextmanager
    async def _given_up_after_timeout(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                yield
        except TimeoutError as error:
            _LOG.warning("a client took nothing for %g s; its stream is cut off", self._write_timeout_s)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientTooSlowError from error

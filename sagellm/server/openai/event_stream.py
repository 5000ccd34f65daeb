"""Server-sent events to one client, who may be slow, or gone."""

import asyncio
import logging
from collections.abc import Sequence

import msgspec
from aiohttp import web

from sagellm.server.openai.errors import ApiError

_LOG = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
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
        await self._write(b"".join([b"data: %b\n\n" % _ENCODER.encode(event) for event in events]) + _DONE)
        return await self._finished()

    async def fail(self, error: ApiError) -> web.StreamResponse:
        """End the stream with an error."""
        await self._write(b"data: %b\n\n" % error.encoded() + _DONE)
        return await self._finished()

    async def _finished(self) -> web.StreamResponse:
        assert self._response is not None
        await self._response.write_eof()
        return self._response

    async def _write(self, data: bytes) -> None:
        if self._response is None:
            response = web.StreamResponse(headers=_HEADERS)
            await response.prepare(self._request)
            self._response = response
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await self._response.write(data)
        except TimeoutError as error:
            _LOG.warning("a client took nothing for %g s; its stream is cut off", self._write_timeout_s)
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ClientTooSlowError from error

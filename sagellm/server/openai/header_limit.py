"""A bound on what a request's header may hold."""

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sagellm.server.openai.errors import ApiError


def header_limit(header_bytes_max: int) -> Middleware:
    """A middleware that refuses requests with more bytes of header fields: 431."""

    @web.middleware
    async def check_header(request: web.Request, handler: Handler) -> web.StreamResponse:
        num_bytes = sum(len(name) + len(value) for name, value in request.raw_headers)
        if num_bytes > header_bytes_max:
            raise ApiError(431, f"the header fields have {num_bytes} bytes, must be at most {header_bytes_max}")
        return await handler(request)

    return check_header

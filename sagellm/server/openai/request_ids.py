"""Names of HTTP requests: the client's own, or one that is drawn, and given back with the answer."""

import secrets
from typing import Any

from aiohttp import web

from sagellm.server.openai.errors import ApiError
from sagellm.server.openai.options import checked_request_id

HEADER = "X-Request-Id"
_NAME = "sagellm_request_id"
# aiohttp 3.14 warns of keys that are plain texts; earlier ones know no others.
_KEY: Any = web.RequestKey(_NAME, str) if hasattr(web, "RequestKey") else _NAME


def request_id_of(request: web.Request) -> str:
    """The request's name. Raises ApiError (400) where the client's own is no name."""
    request_id: str | None = request.get(_KEY)
    if request_id is None:
        request_id = checked_request_id(request.headers.get(HEADER), HEADER) or secrets.token_hex(16)
        request[_KEY] = request_id
    return request_id


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every answer names its request, those too that refuse the client's name."""
    try:
        response.headers[HEADER] = request_id_of(request)
    except ApiError:
        response.headers[HEADER] = secrets.token_hex(16)

"""API keys: ``Authorization: Bearer KEY`` on everything that uses the model."""

import hmac
from hashlib import sha256

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sagellm.server.openai.errors import ApiError

_GUARDED = ("/v1/", "/tokenize", "/detokenize")


def api_key_check(api_keys: tuple[str, ...]) -> Middleware:
    """A middleware that lets requests pass that bring one of the keys. Health and metrics stay open to probes."""
    digests = [sha256(key.encode()).digest() for key in api_keys]

    @web.middleware
    async def check_api_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(_GUARDED) and not _is_known(request.headers.get("Authorization", ""), digests):
            raise ApiError(401, "Authorization: missing or wrong, must be 'Bearer' and a key of this server")
        return await handler(request)

    return check_api_key


def _is_known(authorization: str, digests: list[bytes]) -> bool:
    """Compares with all keys in constant time, so that time tells nothing of them."""
    scheme, _, key = authorization.partition(" ")
    digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == "bearer" and any(matches)

"""Counts and durations of HTTP requests, by endpoint."""

import asyncio
import time

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from sagellm.server.prometheus.bucket_counts import BucketCounts

# The bounds of the instrumentation that vLLM's server uses.
_DURATION_S = (0.1, 0.5, 1.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class HttpMetrics:
    """By handler (the route's path), method, and status in classes (``2xx``). Unknown paths are one handler."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], int] = {}
        self.durations_s: dict[tuple[str, str], BucketCounts] = {}

    def add(self, handler: str, method: str, status: int, duration_s: float) -> None:
        """A request was answered."""
        method = method if method in _METHODS else "other"
        key = (handler, method, f"{status // 100}xx")
        self.counts[key] = self.counts.get(key, 0) + 1
        durations_s = self.durations_s.get((handler, method))
        if durations_s is None:
            durations_s = self.durations_s[handler, method] = BucketCounts(_DURATION_S)
        durations_s.add(duration_s)

    def middleware(self) -> Middleware:
        """Goes before all others, so that it sees the answer as the client does."""

        @web.middleware
        async def count_request(request: web.Request, handler: Handler) -> web.StreamResponse:
            start_s = time.monotonic()
            status = 500
            try:
                response = await handler(request)
                status = response.status
            except asyncio.CancelledError:
                status = 499  # the client went away, as NGINX counts it
                raise
            finally:
                resource = request.match_info.route.resource
                name = "none" if resource is None else resource.canonical
                self.add(name, request.method, status, time.monotonic() - start_s)
            return response

        return count_request

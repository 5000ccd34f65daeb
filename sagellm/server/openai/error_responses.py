"""Every error leaves in OpenAI's form, those of aiohttp itself too."""

import logging

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.typedefs import Handler

from sagellm.server.openai.errors import ApiError, error_body

_LOG = logging.getLogger(__name__)


def error_response(status: int, message: str, param: str | None = None) -> web.Response:
    return web.Response(status=status, body=error_body(status, message, param), content_type="application/json")


def response_of(error: ApiError) -> web.Response:
    response = web.Response(status=error.status, body=error.encoded(), content_type="application/json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


@web.middleware
async def errors_in_openai_form(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what handlers and aiohttp's router raise into OpenAI's error form."""
    try:
        return await handler(request)
    except ApiError as error:
        return response_of(error)
    except web.RequestPayloadError as error:
        response = error_response(400, f"the body cannot be read: {error.__cause__ or error}")
        response.force_close()
        return response
    except web.HTTPRequestEntityTooLarge as error:
        return error_response(413, f"the body is larger than {request.client_max_size} bytes: {error.text}")
    except web.HTTPMethodNotAllowed as error:
        response = error_response(405, f"{request.path} does not take {request.method}")
        response.headers["Allow"] = error.headers["Allow"]
        return response
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(error.status, f"{request.method} {request.path}: {error.reason}")


class OpenAIRequestHandler(web.RequestHandler):
    """A connection whose last resort, too, answers in OpenAI's form."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What a client sees of a request that is not HTTP, or of an error that nobody expected."""
        if status >= 500:
            _LOG.error("request %s %s failed", request.method, request.path, exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun: only the end of the connection can tell of the error")
        if isinstance(exc, LineTooLong):
            status, message = 431, "the request's header fields are too large"
        elif status >= 500:
            message = "the server failed on this request; its log says how"
        response = error_response(status, message or "this is not a valid HTTP request")
        response.force_close()
        return response


class _OpenAIServer(web.Server):
    """aiohttp's server with connections of ours."""

    def __call__(self) -> web.RequestHandler:
        return OpenAIRequestHandler(self, loop=self._loop, **self._kwargs)


class OpenAIRunner(web.AppRunner):
    """aiohttp's runner with a server of ours."""

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()
        return _OpenAIServer(
            plain.request_handler,
            request_factory=plain.request_factory,
            handler_cancellation=plain.handler_cancellation,
            loop=plain._loop,
            **plain._kwargs,
        )

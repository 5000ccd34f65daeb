"""The HTTP application: OpenAI's API, metrics and the live page before an engine."""

from aiohttp import web

from sagellm.server.app_settings import AppSettings
from sagellm.server.engine import Engine
from sagellm.server.openai.error_responses import OpenAIRunner, errors_in_openai_form
from sagellm.server.prometheus.serving_metrics import ServingMetrics

# aiohttp's parser refuses longer header fields itself; up to here the application answers, with 431.
_HEADER_FIELD_BYTES_MAX = 1 << 16


def create_app(engine: Engine, settings: AppSettings, metrics: ServingMetrics | None = None) -> web.Application:
    """The application before this engine. Raises ValueError where the tokeniser cannot be loaded.

    ``metrics`` is the observer that the engine was made with; without it `/metrics` knows of instances only.

    Run it with `make_runner`. It does not drain the engine: whoever stops the server does.
    """
    return web.Application(
        middlewares=[errors_in_openai_form],
        client_max_size=settings.body_bytes_max,
        handler_args={
            "handler_cancellation": True,  # a client that is gone ends its request at once
            "max_field_size": _HEADER_FIELD_BYTES_MAX,
            "max_line_size": _HEADER_FIELD_BYTES_MAX,
        },
    )


def make_runner(app: web.Application) -> web.AppRunner:
    """What serves the application; give it to a `web.TCPSite`. Unlike aiohttp's own, it words all errors alike."""
    return OpenAIRunner(app, access_log=None)

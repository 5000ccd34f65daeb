"""The HTTP application: OpenAI's API, metrics and the live page before an engine."""

import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web
from prometheus_client import CollectorRegistry

from sagellm.server.app_settings import AppSettings
from sagellm.server.engine import Engine
from sagellm.server.openai import generation_endpoints, server_endpoints, token_endpoints
from sagellm.server.openai.authentication import api_key_check
from sagellm.server.openai.error_responses import OpenAIRunner, errors_in_openai_form
from sagellm.server.openai.header_limit import header_limit
from sagellm.server.openai.request_ids import add_request_id
from sagellm.server.openai.serving import SERVING, Serving
from sagellm.server.page import page_endpoints
from sagellm.server.page.live_figures import current_gauges
from sagellm.server.prometheus.collector import MetricsCollector
from sagellm.server.prometheus.http_metrics import HttpMetrics
from sagellm.server.prometheus.serving_metrics import ServingMetrics
from sagellm.server.tokenization.loading import load_tokenizer

# aiohttp's parser refuses longer header fields itself; up to here the application answers, with 431.
_HEADER_FIELD_BYTES_MAX = 1 << 16
_NUM_ENCODERS = 2


def create_app(engine: Engine, settings: AppSettings, metrics: ServingMetrics | None = None) -> web.Application:
    """The application before this engine. Raises ValueError where the tokeniser cannot be loaded.

    ``metrics`` is the observer that the engine was made with; without it `/metrics` knows of instances only.
    Run it with `make_runner`. It does not drain the engine: whoever stops the server does.
    """
    metrics = metrics or ServingMetrics(settings.model_name, settings.max_model_len)
    metrics.series.gauges = lambda: current_gauges(engine)
    http = HttpMetrics()
    middlewares = [http.middleware(), errors_in_openai_form, header_limit(settings.header_bytes_max)]
    if settings.api_keys:
        middlewares.append(api_key_check(settings.api_keys))
    app = web.Application(
        middlewares=middlewares,
        client_max_size=settings.body_bytes_max,
        handler_args={
            "handler_cancellation": True,  # a client that is gone ends its request at once
            "max_field_size": _HEADER_FIELD_BYTES_MAX,
            "max_line_size": _HEADER_FIELD_BYTES_MAX,
        },
    )
    app[SERVING] = Serving(
        engine=engine,
        settings=settings,
        tokenizer=load_tokenizer(settings.tokenizer_folder, settings.chat_template),
        metrics=metrics,
        encoders=ThreadPoolExecutor(_NUM_ENCODERS, thread_name_prefix="encode"),
        started_s=int(time.time()),
    )
    app[page_endpoints.REGISTRY] = CollectorRegistry()
    app[page_endpoints.REGISTRY].register(MetricsCollector(engine, metrics, http))
    app.add_routes(_routes())
    app.on_response_prepare.append(add_request_id)
    app.cleanup_ctx.append(_encoders_closed)
    return app


def make_runner(app: web.Application) -> web.AppRunner:
    """What serves the application; give it to a `web.TCPSite`. Unlike aiohttp's own, it words all errors alike."""
    return OpenAIRunner(app, access_log=None)


def _routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/completions", generation_endpoints.completions),
        web.post("/v1/chat/completions", generation_endpoints.chat_completions),
        web.get("/v1/models", server_endpoints.models),
        web.get("/v1/models/{name:.+}", server_endpoints.model),
        web.get("/health", server_endpoints.health),
        web.get("/ping", server_endpoints.health),
        web.post("/ping", server_endpoints.health),
        web.get("/version", server_endpoints.version),
        web.get("/load", server_endpoints.load),
        web.post("/tokenize", token_endpoints.tokenize),
        web.post("/detokenize", token_endpoints.detokenize),
        web.get("/metrics", page_endpoints.prometheus),
        web.get("/", page_endpoints.live_page),
        web.get("/sagellm/live", page_endpoints.live),
    ]


async def _encoders_closed(app: web.Application) -> AsyncIterator[None]:
    yield
    app[SERVING].encoders.shutdown(wait=False, cancel_futures=True)

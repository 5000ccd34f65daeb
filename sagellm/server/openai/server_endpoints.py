"""What clients, probes and routers ask of the server itself."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from sagellm import __version__
from sagellm.server.openai.errors import ApiError
from sagellm.server.openai.serving import SERVING


class ModelPermission(msgspec.Struct, frozen=True):
    id: str
    created: int
    object: str = "model_permission"
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: None = None
    is_blocking: bool = False


class Model(msgspec.Struct, frozen=True):
    id: str
    created: int
    root: str
    max_model_len: int
    permission: Sequence[ModelPermission]
    object: str = "model"
    owned_by: str = "sagellm"
    parent: None = None


class ModelList(msgspec.Struct, frozen=True):
    data: Sequence[Model]
    object: str = "list"


class Version(msgspec.Struct, frozen=True):
    version: str


class ServerLoad(msgspec.Struct, frozen=True):
    server_load: int  # requests that are not over


async def models(request: web.Request) -> web.Response:
    """``GET /v1/models``."""
    serving = request.app[SERVING]
    return _json(ModelList([_model(request, name) for name in serving.settings.model_names]))


async def model(request: web.Request) -> web.Response:
    """``GET /v1/models/NAME``."""
    name = request.match_info["name"]
    if name not in request.app[SERVING].settings.model_names:
        raise ApiError(404, f"model: {name!r} is not served here", "model")
    return _json(_model(request, name))


def _model(request: web.Request, name: str) -> Model:
    serving = request.app[SERVING]
    settings, created = serving.settings, serving.started_s
    root = settings.model_root or settings.model_name
    return Model(name, created, root, settings.max_model_len, [ModelPermission(f"modelperm-{name}", created)])


async def health(request: web.Request) -> web.Response:
    """``GET /health`` and ``/ping``: 200 with nothing in it while there is an instance, 503 after."""
    return web.Response(status=200 if request.app[SERVING].engine.is_alive else 503)


async def version(_request: web.Request) -> web.Response:
    """``GET /version``."""
    return _json(Version(__version__))


async def load(request: web.Request) -> web.Response:
    """``GET /load``."""
    return _json(ServerLoad(request.app[SERVING].engine.num_unfinished))


def _json(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")

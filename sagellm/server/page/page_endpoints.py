"""``GET /``: the live page; ``GET /sagellm/live``: its figures; ``GET /metrics``: Prometheus'."""

from functools import lru_cache
from importlib.resources import files

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from sagellm.server.openai.errors import invalid
from sagellm.server.openai.serving import SERVING
from sagellm.server.page.live_figures import live_figures

REGISTRY = web.AppKey("REGISTRY", CollectorRegistry)


@lru_cache(maxsize=1)
def page_html() -> str:
    """The page, with its style and script in it: it loads nothing else but its figures."""
    folder = files(__package__) / "assets"
    page = (folder / "live.html").read_text(encoding="utf-8")
    style = (folder / "live.css").read_text(encoding="utf-8")
    script = (folder / "live.js").read_text(encoding="utf-8")
    return page.replace("/*style*/", style).replace("/*script*/", script)


async def live_page(_request: web.Request) -> web.Response:
    """``GET /``."""
    return web.Response(text=page_html(), content_type="text/html", headers={"Cache-Control": "no-cache"})


async def live(request: web.Request) -> web.Response:
    """``GET /sagellm/live?since=SECOND``."""
    serving = request.app[SERVING]
    since = request.query.get("since", "-1")
    if not since.lstrip("-").isdecimal() or len(since) > 18:
        raise invalid("since", f"since: {since[:40]!r}, must be a second of the server's clock")
    body = msgspec.json.encode(live_figures(serving.engine, serving.metrics, int(since)))
    return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})


async def prometheus(request: web.Request) -> web.Response:
    """``GET /metrics``."""
    text = generate_latest(request.app[REGISTRY])
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

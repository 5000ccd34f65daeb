"""The live page: all in one file, and alive in a browser."""

import asyncio
import re
import shutil
import tempfile

import msgspec
import pytest
from echo_engine import EchoEngine
from running_app import running_app

from sagellm.server.page.page_endpoints import page_html
from sagellm.server.prometheus.serving_metrics import ServingMetrics


def test_the_page_loads_nothing_from_elsewhere() -> None:
    html = page_html()
    assert "/*style*/" not in html
    assert "/*script*/" not in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|metrics)|@import|url\(""", html)
    assert set(re.findall(r"https?://[\w./]+", html)) == {"http://www.w3.org/2000/svg"}


def test_figures_are_those_of_the_engine_and_only_new_seconds_are_sent() -> None:
    async def test() -> None:
        metrics = ServingMetrics("toy", 256)
        engine = EchoEngine()
        async with running_app(engine, metrics=metrics) as client:
            second = engine.now_ns() // 1_000_000_000
            metrics.series.emitted((second - 3) * 1_000_000_000, 9)
            figures = msgspec.json.decode((await client.get("/sagellm/live"))[1])
            assert (figures["model"], figures["state"]) == ("toy", "serving")
            assert figures["seconds"][0]["output_tokens"] == 9
            assert figures["seconds"][0]["gauges"]["kv_usage"] == pytest.approx(7 / 64)
            (instance,) = figures["instances"]
            assert (instance["num_blocks_in_use"], instance["num_blocks"]) == (7, 64)
            assert instance["prefix_hit_share"] == pytest.approx(5 / 23)
            assert instance["core_us_per_step"] == pytest.approx(1_000 / 11)
            last = figures["seconds"][-1]["second"]
            again = msgspec.json.decode((await client.get(f"/sagellm/live?since={last}"))[1])
            assert all(each["second"] > last for each in again["seconds"])
            assert (await client.get("/sagellm/live?since=x"))[0] == 400
            engine.is_draining = True
            assert b'"state":"draining"' in (await client.get("/sagellm/live"))[1]

    asyncio.run(test())


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium to look at the page with")
def test_a_browser_shows_the_page_without_complaint() -> None:
    async def test() -> None:
        metrics, engine = ServingMetrics("toy", 256), EchoEngine()
        async with running_app(engine, metrics=metrics) as client:
            metrics.series.emitted(engine.now_ns() - 3_000_000_000, 1234)
            with tempfile.TemporaryDirectory() as profile:
                arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
                arguments += [f"--user-data-dir={profile}", "--virtual-time-budget=1500", client.url]
                pipe = asyncio.subprocess.PIPE
                browser = await asyncio.create_subprocess_exec("chromium", *arguments, stdout=pipe, stderr=pipe)
                dom, log = await asyncio.wait_for(browser.communicate(), 60)
        text = dom.decode()
        assert "CONSOLE" not in log.decode()
        assert '<span class="state serving" id="state">serving</span>' in text
        assert "echo-0" in text
        assert ">2000</text>" in text  # the axis above 1,234 tokens in a second
        assert text.count("<path") == 20  # a line, and dots, for each of the ten figures
        assert "NaN" not in text
        assert "undefined" not in text.split("<script>")[0]

    asyncio.run(test())

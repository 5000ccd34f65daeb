"""What clients, probes and pages see when the last instance goes: the live engine on threads, behind HTTP."""

import asyncio

from running_app import SETTINGS, running_app

from backends.executor_settings import ExecutorSettings
from backends.null.executor import NullExecutor
from sagellm.core.config import ControlPlaneConfig, InstanceConfig
from sagellm.core.identity import InstanceId
from sagellm.server.live.deployment import DeployedInstance, Deployment
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.threaded_instances import ThreadedInstances
from sagellm.server.prometheus.serving_metrics import ServingMetrics

STEP_NS = 2_000_000
_BODY = {"prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}


def test_with_the_last_instance_gone_everybody_is_told() -> None:
    async def test() -> None:
        config = InstanceConfig(InstanceId("a"), 64, repeat_max=1)
        settings = ExecutorSettings(config, "made-up", "none")
        deployment = Deployment("test", "made-up", ControlPlaneConfig(), (DeployedInstance(settings, "none"),))
        host = ThreadedInstances([settings], lambda each: NullExecutor(each, lambda _: STEP_NS), DriverOptions())
        metrics = ServingMetrics("toy", SETTINGS.max_model_len)
        engine = LiveEngine(deployment, host, observers=(metrics,))
        await engine.start()
        async with running_app(engine, metrics=metrics) as client:
            assert (await client.get("/health"))[0] == 200
            async with client.session.post(client.url + "/v1/completions", json=_BODY) as response:
                assert response.status == 200
                await response.content.readuntil(b"\n\n")
                host.kill(InstanceId("a"))
                rest = await response.read()
            assert b'"code":503' in rest
            assert b"no instance is left" in rest
            assert rest.endswith(b"data: [DONE]\n\n")
            for path in ("/health", "/ping"):
                assert (await client.get(path))[0] == 503
            assert (await client.post("/v1/completions", _BODY))[0] == 503
            _, exposed = await client.get("/metrics")
            lines = exposed.decode().splitlines()
            (up,) = [line for line in lines if line.startswith("sagellm:instance_up{")]
            (running,) = [line for line in lines if line.startswith("sagellm:instance_requests_running{")]
            assert up.endswith(" 0.0")
            assert running.endswith(" 0.0")
            assert (await client.get("/"))[0] == 200
            assert metrics.num_requests_kept == 0
        await engine.drain(0)

    asyncio.run(test())

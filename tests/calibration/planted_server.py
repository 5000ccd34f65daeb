"""A whole server over real HTTP whose device takes exactly the time that a price table says."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from backends.executor_settings import ExecutorSettings
from backends.null.executor import NullExecutor
from sagellm.cluster.description import ClusterDescription
from sagellm.core.log import LogHeader
from sagellm.core.plan import StepPlan
from sagellm.core.step_executor import StepExecutor
from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sagellm.server.app import create_app, make_runner
from sagellm.server.app_settings import AppSettings
from sagellm.server.live.deployment import deploy
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.threaded_instances import ThreadedInstances
from sagellm.server.prometheus.serving_metrics import ServingMetrics
from sim.calibration.timed_steps import features_of

US = 10**9  # femtoseconds
TRUTH = StepPriceTable(
    graph_sizes=(),
    decode_num_seqs=(1, 8),
    decode_base_fs=(900 * US, 1_300 * US),
    decode_context_fs=(US // 5, US // 5),
    mixed_num_tokens=(1, 128),
    mixed_base_fs=(1_000 * US, 4_000 * US),
    mixed_floor_fs=0,
    mixed_seq_fs=20 * US,
    mixed_context_fs=US // 4,
    token_pair_fs=US // 20,
    chunk_context_fs=0,
    host_base_fs=0,
    host_seq_fs=0,
)
NS_PER_FS = 1e-6


def planted_executor(settings: ExecutorSettings, table: StepPriceTable) -> StepExecutor:
    """An executor without a model, as slow as the table says."""
    model = TabulatedStepCost(table, "measured", 0)

    def duration_ns(plan: StepPlan) -> int:
        return round(model.step_cost(features_of(plan)).device_fs * NS_PER_FS)

    return NullExecutor(settings, duration_ns)


@contextmanager
def planted_server(cluster: ClusterDescription, table: StepPriceTable, log_path: Path) -> Iterator[str]:
    """Its address. The log is complete when it has been left."""
    loop = asyncio.new_event_loop()
    urls: list[str] = []
    is_up = threading.Event()
    stop = asyncio.Event()

    async def serve() -> None:
        deployment = deploy(cluster, backend="none")
        settings = [each.settings for each in deployment.instances]
        host = ThreadedInstances(settings, lambda each: planted_executor(each, table), DriverOptions(keeps_log=True))
        with log_path.open("wb") as file:
            instances = tuple(each.instance for each in settings)
            header = LogHeader(cluster.name, "planted", 0, deployment.control_plane, instances)
            metrics = ServingMetrics("planted", 4096)
            engine = LiveEngine(deployment, host, observers=(metrics,), log=LiveLog(file, header))
            app = create_app(engine, AppSettings(("planted",), 4096, vocab_size=512), metrics)
            runner = make_runner(app)
            await engine.start()
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            is_up.set()
            await stop.wait()
            await engine.drain(1.0)
            await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert is_up.wait(20), "the server did not start"
    try:
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()

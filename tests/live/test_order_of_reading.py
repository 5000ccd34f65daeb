"""In which order the front lets readers go on, where a step has tokens for many."""

import asyncio
from collections.abc import Awaitable, Callable

from both_drivers import Cluster, instance, request

from backends.null.executor import NullExecutor
from sagellm.server.engine import OutputDelta
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.request_stream import RequestStream
from sagellm.server.live.threaded_instances import ThreadedInstances

NUM_STREAMS = 100
STEP_NS = 5_000_000
CLUSTER = Cluster((instance("a", num_blocks=1024),))


class Reader:
    """Reads a stream and counts; ``on_token`` is called before each token is counted."""

    def __init__(self, stream: RequestStream, on_token: Callable[[], None] = lambda: None) -> None:
        self.stream = stream
        self.num_read = 0
        self._on_token = on_token
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for item in self.stream:
            if isinstance(item, OutputDelta):
                self._on_token()
                self.num_read += len(item.token_ids)

    @property
    def num_unread(self) -> int:
        return len(self.stream.output_token_ids) - self.num_read


def serve(scenario: Callable[[LiveEngine, list[Reader]], Awaitable[None]]) -> None:
    """Begin when all streams decode."""
    settings = [each.settings for each in CLUSTER.deployment().instances]

    async def run() -> None:
        host = ThreadedInstances(settings, lambda one: NullExecutor(one, lambda _: STEP_NS), DriverOptions())
        engine = LiveEngine(CLUSTER.deployment(), host)
        await engine.start()
        readers = [Reader(engine.submit(request(index, 4, 80, first_id=index))) for index in range(NUM_STREAMS)]
        while not all(reader.num_read for reader in readers):
            await asyncio.sleep(0.001)
        try:
            await asyncio.wait_for(scenario(engine, readers), 20)
            await asyncio.gather(*(reader.task for reader in readers))
            assert all(reader.num_read == 80 for reader in readers)
        finally:
            await engine.drain(0)

    asyncio.run(run())


def test_a_first_token_is_read_before_those_of_requests_that_decode() -> None:
    async def scenario(engine: LiveEngine, readers: list[Reader]) -> None:
        num_behind: list[int] = []

        def note() -> None:
            num_behind.append(sum(reader.num_unread > 0 for reader in readers))

        await Reader(engine.submit(request("new", 4, 1, first_id=NUM_STREAMS)), note).task
        assert num_behind == [NUM_STREAMS]

    serve(scenario)


def test_what_comes_meanwhile_does_not_wait_for_all_readers() -> None:
    async def scenario(engine: LiveEngine, readers: list[Reader]) -> None:
        while any(reader.num_unread for reader in readers):
            await asyncio.sleep(0)
        before = sum(reader.num_read for reader in readers)
        while sum(reader.num_read for reader in readers) == before:
            await asyncio.sleep(0)
        # The first readers of a step went on just now; the loop came here before the last ones.
        assert any(reader.num_unread for reader in readers)

    serve(scenario)

"""Instances as threads of the front's own process, for small machines and for looking inside."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import assert_never

from backends.executor_settings import ExecutorSettings
from sagellm.core.identity import InstanceId
from sagellm.core.step_executor import StepExecutor
from sagellm.server.live.instance_driver import DriverOptions, InstanceDriver
from sagellm.server.live.instance_host import HostListener, StartError
from sagellm.server.live.wire import (
    FromInstance,
    InstanceDied,
    PeerMessage,
    Started,
    StartFailed,
    Stop,
    ToInstance,
    Turn,
)

ExecutorFactory = Callable[[ExecutorSettings], StepExecutor]
STOP_S = 10.0


class ThreadedInstances:
    """An `InstanceHost`."""

    def __init__(
        self, settings: Sequence[ExecutorSettings], make_executor: ExecutorFactory, options: DriverOptions
    ) -> None:
        self._threads = {
            each.instance.instance_id: _InstanceThread(each, make_executor, options, self) for each in settings
        }
        self._loop: asyncio.AbstractEventLoop
        self._listener: HostListener
        self._starts: dict[InstanceId, asyncio.Future[None]] = {}
        self._gone: dict[InstanceId, None] = {}

    async def start(self, listener: HostListener) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._starts = {instance_id: self._loop.create_future() for instance_id in self._threads}
        for thread in self._threads.values():
            thread.start()
        try:
            await asyncio.gather(*self._starts.values())
        except BaseException:
            await self.stop()
            raise

    def send(self, instance_id: InstanceId, message: ToInstance) -> None:
        if instance_id not in self._gone:
            self._threads[instance_id].inbox.put(message)

    def kill(self, instance_id: InstanceId) -> None:
        if instance_id not in self._gone:
            self._gone[instance_id] = None
            self._threads[instance_id].is_killed = True
            self._threads[instance_id].inbox.put(None)
            self._loop.call_soon(self._listener.on_lost, instance_id, "it was killed")

    async def stop(self) -> None:
        for instance_id in self._threads:
            self.send(instance_id, Stop())
        for thread in self._threads.values():
            await asyncio.to_thread(thread.join, STOP_S)
        await asyncio.sleep(0)  # what the threads said last is on the loop

    # --- called by the threads ---------------------------------------------------------------------------

    def to_front(self, message: FromInstance) -> None:
        self._loop.call_soon_threadsafe(self._heard, message)

    def to_peer(self, peer_id: InstanceId, message: PeerMessage) -> None:
        thread = self._threads[peer_id]
        if not thread.is_killed:
            thread.inbox.put(message)

    def forget_peer(self, peer_id: InstanceId) -> None:
        """Nothing is kept for it here."""

    def _heard(self, message: FromInstance) -> None:
        instance_id = message.instance_id
        if instance_id in self._gone:
            return
        match message:
            case Started():
                self._starts[instance_id].set_result(None)
                self._listener.on_started(instance_id)
            case StartFailed(reason=reason):
                self._gone[instance_id] = None
                self._starts[instance_id].set_exception(StartError(f"{instance_id}: {reason}"))
            case InstanceDied(reason=reason):
                self._gone[instance_id] = None
                self._listener.on_lost(instance_id, reason)
            case Turn():
                self._listener.on_message(instance_id, message)
            case _:
                assert_never(message)


class _InstanceThread(threading.Thread):
    """Runs one instance's driver."""

    def __init__(
        self,
        settings: ExecutorSettings,
        make_executor: ExecutorFactory,
        options: DriverOptions,
        host: ThreadedInstances,
    ) -> None:
        super().__init__(name=f"instance {settings.instance.instance_id}", daemon=True)
        self._settings = settings
        self._make_executor = make_executor
        self._options = options
        self._host = host
        self.inbox: SimpleQueue[ToInstance | PeerMessage | None] = SimpleQueue()  # None only wakes
        self.is_killed = False
        self.driver: InstanceDriver | None = None  # for looking inside

    def run(self) -> None:
        config = self._settings.instance
        try:
            executor = self._make_executor(self._settings)
            driver = InstanceDriver(config, executor, self._host, self._options)
            self.driver = driver
            driver.start(lambda: self.inbox.put(None))
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            self._host.to_front(StartFailed(config.instance_id, str(error)))
            return
        self._host.to_front(Started(config.instance_id))
        try:
            self._serve(driver)
        except Exception as error:
            # A fault of ours: the front goes on without this instance, and the trace is shown.
            self._host.to_front(InstanceDied(config.instance_id, f"{type(error).__name__}: {error}"))
            raise
        finally:
            driver.close()

    def _serve(self, driver: InstanceDriver) -> None:
        while not driver.is_over:
            for message in self._arrived(driver.wait_s()):
                driver.take(message)
            if self.is_killed:
                return
            driver.turn()

    def _arrived(self, wait_s: float) -> list[ToInstance | PeerMessage]:
        """All that is there, and where there is nothing, what comes first."""
        arrived: list[ToInstance | PeerMessage] = []
        try:
            message = self.inbox.get(timeout=wait_s) if wait_s > 0 else self.inbox.get_nowait()
            while True:
                if message is not None:
                    arrived.append(message)
                message = self.inbox.get_nowait()
        except Empty:
            return arrived

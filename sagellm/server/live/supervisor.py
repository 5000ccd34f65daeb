"""Instances as processes: started, heard, watched, started again when they are lost, and ended with the front.

A process that ends, and one that says nothing for too long, is lost. What it had said by then is taken
first; what was still on its way is dropped, for nobody has acted on it. After a pause another one takes its
place: a short one at first, longer each time that it does not last.
"""

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import msgspec
import zmq

from backends.executor_settings import ExecutorSettings
from sagellm.core.identity import InstanceId
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.instance_host import HostListener, StartError
from sagellm.server.live.instance_process import ProcessSettings, write_settings
from sagellm.server.live.wire import FromInstance, InstanceDied, Started, StartFailed, Stop, ToInstance, Turn

_LOG = logging.getLogger(__name__)

SILENCE_S_MAX = 30.0
"""An instance speaks twice a second; one that has been silent for so long is hung."""
STOP_S = 10.0
RESTART_AFTER_S = 2.0
"""The first pause before an instance that was lost is started again. It doubles with each loss in a row."""
RESTART_AFTER_S_MAX = 60.0
LASTING_S = 300.0
"""One that ran for so long was not lost in a row with the one before it."""
_LAST_WORDS_S = 0.02
_MESSAGES_AT_ONCE = 4
_WATCH_EVERY_S = 1.0


class _InstanceProcess:
    """One process, and the front's end of the line to it."""

    def __init__(self, settings: ProcessSettings, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.settings = settings
        self.instance_id = settings.executor.instance.instance_id
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.listens = False  # it has said that it runs; until then nobody reads what it is told
        self.is_gone = False
        self.is_due = False  # what it said will be looked at soon
        self.last_words = ""
        self.heard_s = 0.0
        self.listens_s = 0.0  # since when it runs
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.bind(settings.front_endpoint)
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it, in a session of its own: a Ctrl-C is for the front alone."""
        command = [sys.executable, "-m", "sagellm.server.live.instance_process"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        assert self.process.stdin is not None
        write_settings(self.process.stdin, self.settings)  # type: ignore[arg-type]
        return self.process

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()


class InstanceProcesses:
    """An `InstanceHost`."""

    def __init__(
        self,
        settings: Sequence[ExecutorSettings],
        options: DriverOptions,
        *,
        silence_s_max: float = SILENCE_S_MAX,
        restart_after_s: float = RESTART_AFTER_S,
    ) -> None:
        self._settings = settings
        self._options = options
        self._silence_s_max = silence_s_max
        self._restart_after_s = restart_after_s
        self._losses_in_a_row: Counter[InstanceId] = Counter()
        self._ended: dict[InstanceId, None] = {}  # for good
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromInstance)
        self._processes: dict[InstanceId, _InstanceProcess] = {}
        self._is_stopping = False
        self._watcher: asyncio.Task[None] | None = None
        self._folder: Path
        self._loop: asyncio.AbstractEventLoop
        self._listener: HostListener
        self._context: zmq.Context[zmq.Socket[bytes]]

    # --- life ------------------------------------------------------------------------------------------

    async def start(self, listener: HostListener) -> None:
        """See `InstanceHost`."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._context = zmq.Context()
        self._folder = Path(tempfile.mkdtemp(prefix="sagellm-"))
        try:
            for settings in self._process_settings():
                self._spawn(_InstanceProcess(settings, self._context))
            await asyncio.gather(*(each.started for each in self._processes.values()))
        except zmq.ZMQError as error:
            await self.stop()
            raise StartError(f"no socket can be made in {self._folder}: {error}; a shorter TMPDIR may help") from error
        except BaseException:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._watch())

    def _process_settings(self) -> list[ProcessSettings]:
        endpoints = {
            each.instance.instance_id: f"ipc://{self._folder}/peer-{index}" for index, each in enumerate(self._settings)
        }
        return [
            ProcessSettings(each, self._options, os.getpid(), f"ipc://{self._folder}/front-{index}-0", endpoints)
            for index, each in enumerate(self._settings)
        ]

    def _spawn(self, process: _InstanceProcess) -> None:
        self._processes[process.instance_id] = process
        try:
            popen = process.spawn()
        except OSError:
            process.kill()
            process.exited.set_result(-1)
            raise

        def wait() -> None:
            code = popen.wait()
            self._loop.call_soon_threadsafe(self._on_exit, process, code)

        threading.Thread(target=wait, name=f"waits for {process.instance_id}", daemon=True).start()
        self._loop.add_reader(process.socket.fileno(), self._hear, process)

    async def stop(self) -> None:
        """See `InstanceHost`."""
        self._is_stopping = True
        if self._watcher is not None:
            self._watcher.cancel()
        living = [each for each in self._processes.values() if not each.exited.done()]
        for process in living:
            if process.listens:
                self.send(process.instance_id, Stop())
            else:
                self.kill(process.instance_id)
        if living:
            await asyncio.wait([each.exited for each in living], timeout=STOP_S)
        for process in living:
            self.kill(process.instance_id)
            await process.exited
        for process in self._processes.values():
            self._hang_up(process)
        self._context.destroy(0)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- messages --------------------------------------------------------------------------------------

    def send(self, instance_id: InstanceId, message: ToInstance) -> None:
        """See `InstanceHost`."""
        process = self._processes[instance_id]
        if process.is_gone:
            return
        try:
            process.socket.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return  # its end of the line is gone, and so is it: that is noticed in a moment
        # Sending may swallow the sign that something has arrived.
        if not process.is_due and int(process.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            process.is_due = True
            self._loop.call_soon(self._hear, process)

    def _hear(self, process: _InstanceProcess) -> None:
        """Take what has arrived, with pauses: one instance that talks a lot must not keep clients waiting."""
        process.is_due = False
        if self._hear_some(process, _MESSAGES_AT_ONCE) and not process.is_due:
            process.is_due = True
            self._loop.call_soon(self._hear, process)

    def _hear_some(self, process: _InstanceProcess, num_messages_max: int) -> bool:
        """Take so many messages at most; True where there may be more.

        The socket gives one sign for any number of messages, so somebody must come back for the others.
        """
        try:
            for _ in range(num_messages_max):
                if process.is_gone:
                    return False
                payload = process.socket.recv(zmq.NOBLOCK)
                process.heard_s = self._loop.time()
                self._heard(process, self._decoder.decode(payload))
        except zmq.Again:
            return False
        return True

    def _hear_all(self, process: _InstanceProcess) -> None:
        while self._hear_some(process, _MESSAGES_AT_ONCE):
            continue

    def _heard(self, process: _InstanceProcess, message: FromInstance) -> None:
        match message:
            case Started():
                process.listens = True
                process.listens_s = self._loop.time()
                if not process.started.done():
                    process.started.set_result(None)
                    self._say_started(process)
            case StartFailed(reason=reason):
                if not process.started.done():
                    process.started.set_exception(StartError(f"{process.instance_id}: {reason}"))
            case Turn():
                self._listener.on_message(process.instance_id, message)
            case InstanceDied(reason=reason):
                # A process whose device is broken may hang when it tries to leave.
                process.last_words = reason
                process.kill()
            case _:
                assert_never(message)

    def _say_started(self, process: _InstanceProcess) -> None:
        incarnation = process.settings.incarnation
        if incarnation:
            self._listener.on_back(process.instance_id, incarnation)
        else:
            self._listener.on_started(process.instance_id)

    # --- losses ----------------------------------------------------------------------------------------

    def kill(self, instance_id: InstanceId) -> None:
        """See `InstanceHost`."""
        self._ended[instance_id] = None
        self._processes[instance_id].kill()

    def _on_exit(self, process: _InstanceProcess, code: int) -> None:
        self._hear_all(process)
        # The last that it said may still be on its way from the kernel to the socket.
        self._loop.call_later(_LAST_WORDS_S, self._lose, process, code)

    def _lose(self, process: _InstanceProcess, code: int) -> None:
        self._hear_all(process)
        self._hang_up(process)
        assert process.process is not None
        assert process.process.stdin is not None
        process.process.stdin.close()
        if not process.exited.done():
            process.exited.set_result(code)
        how = process.last_words or _ending(code)
        if not process.started.done():
            process.started.set_exception(StartError(f"{process.instance_id}: {how} while it started"))
            process.started.exception()  # whoever waits for it hears of it; where nobody does, all is well, too
        if self._is_stopping:
            return
        if process.listens:
            self._listener.on_lost(process.instance_id, how)
        elif process.settings.incarnation:
            _LOG.error("%s", process.started.exception())
        else:
            return  # nobody was served by it yet: the server does not start
        if process.instance_id not in self._ended:
            self._loop.call_later(self._pause_s(process), self._start_again, process.settings)

    def _pause_s(self, lost: _InstanceProcess) -> float:
        """How long to wait before another one takes its place."""
        instance_id = lost.instance_id
        if lost.listens and self._loop.time() - lost.listens_s > LASTING_S:
            del self._losses_in_a_row[instance_id]
        doublings = min(self._losses_in_a_row[instance_id], 16)  # far above the longest pause
        self._losses_in_a_row[instance_id] += 1
        return min(self._restart_after_s * 2.0**doublings, max(self._restart_after_s, RESTART_AFTER_S_MAX))

    def _start_again(self, settings: ProcessSettings) -> None:
        if self._is_stopping or settings.executor.instance.instance_id in self._ended:
            return
        incarnation = settings.incarnation + 1
        # What is bound to the old name may be taken away at any moment from now on.
        endpoint = f"{settings.front_endpoint.rpartition('-')[0]}-{incarnation}"
        again = msgspec.structs.replace(settings, incarnation=incarnation, front_endpoint=endpoint)
        process = _InstanceProcess(again, self._context)
        try:
            self._spawn(process)
        except OSError as error:
            _LOG.error("%s could not be started again: %s", process.instance_id, error)
            self._loop.call_later(self._pause_s(process), self._start_again, again)

    def _hang_up(self, process: _InstanceProcess) -> None:
        if not process.is_gone:
            process.is_gone = True
            self._loop.remove_reader(process.socket.fileno())
            process.socket.close(0)

    async def _watch(self) -> None:
        """End processes that are there and say nothing."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            for process in self._processes.values():
                self._hear_all(process)
                if (
                    process.listens
                    and not process.is_gone
                    and self._loop.time() > process.heard_s + self._silence_s_max
                ):
                    process.last_words = f"it has been silent for {self._silence_s_max:g} s"
                    process.kill()


def _ending(code: int) -> str:
    """How a process ended that did not say why."""
    if code == -signal.SIGKILL:
        return f"it was ended by signal {signal.SIGKILL}, which a host that is out of memory sends"
    return f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"

"""A process that is one instance. The front starts it, tells it what to be on its standard input, and
holds that pipe open: when the front is gone, the pipe ends, and so does the process.

Run as ``python -m sagellm.server.live.instance_process``.
"""

import ctypes
import math
import os
import select
import signal
import socket
import struct
import sys
from typing import BinaryIO

import msgspec
import zmq

from backends.executor_settings import ExecutorSettings
from backends.model_runner.factory import make_executor
from sagellm.core.identity import InstanceId
from sagellm.server.live.instance_driver import DriverOptions, InstanceDriver
from sagellm.server.live.long_lived_objects import keep_for_good
from sagellm.server.live.wire import FromInstance, InstanceDied, PeerMessage, Started, StartFailed, ToInstance

_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LINGER_MS = 5_000
"""How long a process that leaves tries to get its last words across."""
SWITCH_INTERVAL_S = 0.0005
"""How long one thread of Python may keep another waiting."""


class ProcessSettings(msgspec.Struct, frozen=True):
    """What one instance's process is told."""

    executor: ExecutorSettings
    options: DriverOptions
    parent_process_id: int
    front_endpoint: str
    peer_endpoints: dict[InstanceId, str]  # of all instances, its own too
    incarnation: int = 0  # how often an instance of this name was lost before


def write_settings(pipe: BinaryIO, settings: ProcessSettings) -> None:
    """The first thing on the process's standard input."""
    data = msgspec.msgpack.encode(settings)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_settings(pipe: BinaryIO) -> ProcessSettings:
    (length,) = _LENGTH.unpack(pipe.read(_LENGTH.size))
    return msgspec.msgpack.decode(pipe.read(length), type=ProcessSettings)


class InstanceSockets:
    """An instance's sockets, as an `InstanceOutbox` and as what its process waits on."""

    def __init__(self, settings: ProcessSettings) -> None:
        self._context = zmq.Context()
        self._peer_endpoints = settings.peer_endpoints
        self._front = self._make(zmq.DEALER)
        self._front.connect(settings.front_endpoint)
        self._peers_in = self._make(zmq.PULL)
        self._peers_in.bind(settings.peer_endpoints[settings.executor.instance.instance_id])
        self._peers_out: dict[InstanceId, zmq.Socket[bytes]] = {}
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._encoder = msgspec.msgpack.Encoder()
        self._front_decoder = msgspec.msgpack.Decoder(ToInstance)
        self._peer_decoder = msgspec.msgpack.Decoder(PeerMessage)
        self._lifeline = sys.stdin.fileno()
        self._poller = zmq.Poller()
        for source in (self._front, self._peers_in, self._woken, self._lifeline):
            self._poller.register(source, zmq.POLLIN)

    def _make(self, kind: int) -> "zmq.Socket[bytes]":
        made: zmq.Socket[bytes] = self._context.socket(kind)
        made.set_hwm(0)  # what is under way is bounded by the requests that are
        made.linger = LINGER_MS
        return made

    def to_front(self, message: FromInstance) -> None:
        self._front.send(self._encoder.encode(message))

    def to_peer(self, peer_id: InstanceId, message: PeerMessage) -> None:
        peer = self._peers_out.get(peer_id)
        if peer is None:
            peer = self._peers_out[peer_id] = self._make(zmq.PUSH)
            peer.linger = 0  # a peer that is gone takes nothing
            peer.connect(self._peer_endpoints[peer_id])
        peer.send(self._encoder.encode(message), copy=False)

    def forget_peer(self, peer_id: InstanceId) -> None:
        peer = self._peers_out.pop(peer_id, None)
        if peer is not None:
            peer.close()

    def wake(self) -> None:
        """End a `wait` from any thread."""
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            return  # it is full of wake-ups already

    def wait(self, driver: InstanceDriver) -> None:
        """Until something arrives or the driver has something to do; the driver takes what arrived."""
        ready = dict(self._poller.poll(math.ceil(driver.wait_s() * 1000)))
        if self._lifeline in ready:
            os._exit(1)  # the front is gone: nobody is left to talk to
        if self._woken in ready or self._woken.fileno() in ready:
            self._woken.recv(4096)
        for payload in _drain(self._front):
            driver.take(self._front_decoder.decode(payload))
        for payload in _drain(self._peers_in):
            driver.take(self._peer_decoder.decode(payload))

    def close(self) -> None:
        """Get the last words across."""
        self._peers_in.close(0)
        for peer in self._peers_out.values():
            peer.close()
        self._front.close()
        self._context.term()


def _drain(source: "zmq.Socket[bytes]") -> list[bytes]:
    payloads: list[bytes] = []
    try:
        while True:
            payloads.append(source.recv(zmq.NOBLOCK))
    except zmq.Again:
        return payloads


def run(settings: ProcessSettings) -> int:
    """Serve until told to stop, or until the device dies; the exit code."""
    instance_id = settings.executor.instance.instance_id
    sockets = InstanceSockets(settings)
    try:
        executor = make_executor(settings.executor)
        driver = InstanceDriver(
            settings.executor.instance, executor, sockets, settings.options, incarnation=settings.incarnation
        )
        driver.start(sockets.wake)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sockets.to_front(StartFailed(instance_id, str(error)))
        sockets.close()
        return 1
    keep_for_good()
    sockets.to_front(Started(instance_id))
    try:
        while not driver.is_over:
            sockets.wait(driver)
            driver.turn()
    except Exception as error:
        # A fault of ours: the front goes on without this instance, and is told why.
        sockets.to_front(InstanceDied(instance_id, f"{type(error).__name__}: {error}"))
        raise
    finally:
        sockets.close()
        driver.close()
    return 0


def die_with(parent_process_id: int) -> None:
    """Have the kernel end this process with its parent, where it can: also in the middle of loading."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_process_id:
        os._exit(1)


def main() -> None:
    # The thread that launches steps computes in Python for milliseconds, while this one has to tell of the step before.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # Whoever stops the server stops the front, which lets its instances finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as pipe:
        if not select.select([pipe], [], [], 60)[0]:
            sys.exit("this process is started by `sagellm serve`, which tells it what to be")
        settings = read_settings(pipe)
    die_with(settings.parent_process_id)
    sys.exit(run(settings))


if __name__ == "__main__":
    main()

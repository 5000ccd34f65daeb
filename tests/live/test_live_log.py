"""A live log is whole lines at any moment, in the simulator's format."""

import errno
import io
from pathlib import Path

import pytest
from both_drivers import Cluster, instance, request
from typing_extensions import Buffer

from sagellm.core.identity import CONTROL_PLANE
from sagellm.core.log import LogWriter, read_log
from sagellm.core.messages import AssignRequest, RequestArrived
from sagellm.log_replay import replay_log
from sagellm.server.live.live_log import LiveLog, LogLines

CLUSTER = Cluster((instance("a"),))


def test_it_is_written_as_the_simulator_writes_it() -> None:
    spec = request("r")
    simulated, live = io.BytesIO(), io.BytesIO()
    writer = LogWriter(CLUSTER.header(), simulated)
    lines = LogLines(CONTROL_PLANE)
    writer.event(1, CONTROL_PLANE, RequestArrived(spec))
    lines.event(1, RequestArrived(spec))
    effects = (AssignRequest(CLUSTER.instances[0].instance_id, spec),)
    writer.polled(2, CONTROL_PLANE, effects)
    lines.polled(2, effects)
    writer.close()
    log = LiveLog(live, CLUSTER.header())
    log.write(lines.take())
    log.close()
    assert lines.take() == b""
    assert live.getvalue() == simulated.getvalue()


def test_what_a_crash_leaves_can_be_read(tmp_path: Path) -> None:
    """Nobody closes the log; what is in the file so far ends with a line's end, and replays."""
    path = tmp_path / "log"
    lines = LogLines(CONTROL_PLANE)
    with path.open("wb") as file:
        log = LiveLog(file, CLUSTER.header())
        for number in range(2000):
            lines.event(number, RequestArrived(request(number, 1000)))
            lines.polled(number, ())
            log.write(lines.take())
            if number % 500 == 0:
                assert path.read_bytes().endswith(b"\n")
        so_far = path.read_bytes()
    assert so_far.endswith(b"\n")
    header, records = read_log(iter(so_far.splitlines(keepends=True)), "log")
    assert header == CLUSTER.header()
    # A megabyte at most is held back.
    assert len(list(records)) > 3000


def test_a_full_disk_ends_the_log_and_not_the_server(caplog: pytest.LogCaptureFixture) -> None:
    class FullDisk(io.BytesIO):
        num_bytes_left = 5_000

        def write(self, data: Buffer) -> int:
            self.num_bytes_left -= len(memoryview(data))
            if self.num_bytes_left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    lines = LogLines(CONTROL_PLANE)
    log = LiveLog(FullDisk(), CLUSTER.header())
    for number in range(2000):
        lines.event(number, RequestArrived(request(number, 1000)))
        log.write(lines.take())
    log.close()
    assert caplog.text.count("No space left on device") == 1


def test_a_tampered_log_does_not_replay() -> None:
    from both_drivers import Script, run_live

    log = run_live(CLUSTER, Script(((0, request("r", 20, 3)),))).log
    assert replay_log(iter(log.splitlines(keepends=True)), "log").difference is None
    tampered = log.replace(b'"reason":"length"', b'"reason":"error"')
    assert tampered != log
    assert replay_log(iter(tampered.splitlines(keepends=True)), "log").difference is not None

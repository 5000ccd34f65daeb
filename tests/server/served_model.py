"""``sagellm serve`` as a process of its own, for as long as a test module needs it."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START_S = 60
_STOP_S = 30


@dataclass(frozen=True)
class ServedModel:
    url: str
    process: "subprocess.Popen[str]"

    def live(self) -> dict[str, Any]:
        """What the live page shows."""
        with urllib.request.urlopen(f"{self.url}/sagellm/live", timeout=10) as answer:
            figures: dict[str, Any] = json.load(answer)
        return figures

    def wait_until_idle(self) -> dict[str, Any]:
        """The figures once nothing runs, waits or holds blocks; fails where that does not come."""
        end_s = time.monotonic() + 10
        while True:
            figures = self.live()
            held = [each["num_running"] + each["num_blocks_in_use"] for each in figures["instances"]]
            if not figures["num_unfinished"] and not any(held):
                return figures
            assert time.monotonic() < end_s, figures
            time.sleep(0.02)


@contextmanager
def served_model(log_folder: Path, *arguments: str) -> Iterator[ServedModel]:
    """Start a server at a free port; at the end it must leave in good order when told to."""
    command = [sys.executable, "-m", "sagellm", "serve", "--host", "127.0.0.1", "--port", "0", *arguments]
    errors = log_folder / "serve.err"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            yield ServedModel(_announced_url(process, errors), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(_STOP_S) == 0, errors.read_text()
            assert "Traceback" not in errors.read_text(), errors.read_text()
        finally:
            process.kill()


def _announced_url(process: "subprocess.Popen[str]", errors: Path) -> str:
    assert process.stdout is not None
    end_s = time.monotonic() + _START_S
    for line in process.stdout:
        found = re.search(r"http://\S+?:\d+", line)
        if found:
            return found[0]
        assert time.monotonic() < end_s, "the server did not start"
    raise AssertionError(f"the server left before it served: {errors.read_text()}")

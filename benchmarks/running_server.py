"""`sagellm serve` as a process of its own, traces sent to it by `sagellm replay`, and its log replayed."""

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_S = 900.0
SAGELLM = (sys.executable, "-m", "sagellm")


@dataclass(frozen=True, slots=True)
class Served:
    """What is served: random weights, on one port of this host. ``model`` may be empty: the cluster file's."""

    cluster: str
    log_path: Path
    model: str = ""
    port: int = 8123
    options: tuple[str, ...] = ()  # further ones of `sagellm serve`

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@dataclass(frozen=True, slots=True)
class LogReplay:
    """What `sagellm log replay` said of a log."""

    exit_code: int
    text: str

    @property
    def is_equal(self) -> bool:
        return self.exit_code == 0

    def __str__(self) -> str:
        return f"exit code {self.exit_code}: {self.text}"


@contextmanager
def running_server(served: Served) -> Iterator[subprocess.Popen[bytes]]:
    """Started, and stopped at the end whatever happened; whether it is ready is for the caller to wait for."""
    server = start_server(served)
    try:
        yield server
    finally:
        if server.poll() is None:
            stop(server)


def start_server(served: Served) -> subprocess.Popen[bytes]:
    command = [*SAGELLM, "serve", "--cluster", served.cluster, "--load-format", "dummy"]
    command += ["--port", str(served.port), "--log", str(served.log_path), *served.options]
    if served.model:
        command += ["--model", served.model]
    return subprocess.Popen(command)


def wait_until_ready(server: subprocess.Popen[bytes], base_url: str) -> float:
    """Seconds until it answers; raises RuntimeError where it ends before."""
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < READY_S:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5):
                return time.perf_counter() - started_s
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready after {READY_S:.0f} s")


def replay_on(
    base_url: str, trace: str, json_path: Path, options: Sequence[str] = (), *, is_quiet: bool = False
) -> dict[str, object]:
    """The JSON of one `sagellm replay` of the trace; raises RuntimeError with its last line where it failed.

    A quiet one prints no table.
    """
    command = [*SAGELLM, "replay", trace, "--on", base_url, "--json", str(json_path), *options]
    output = subprocess.PIPE if is_quiet else None
    done = subprocess.run(command, stdout=output, stderr=output, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or "").strip().splitlines()
        raise RuntimeError(f"`sagellm replay` ended with exit code {done.returncode}: {said[-1] if said else ''}")
    result: dict[str, object] = json.loads(json_path.read_text(encoding="utf-8"))
    return result


def core_share(base_url: str) -> str:
    """The lines of /metrics that say what the core cost, for the record."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return "\n".join(line for line in lines if line.startswith("sagellm:") and "core" in line)


def stop(server: subprocess.Popen[bytes]) -> int:
    server.send_signal(signal.SIGTERM)
    return server.wait(timeout=120)


def log_replays(log_path: Path) -> LogReplay:
    """The log through fresh machines."""
    done = subprocess.run([*SAGELLM, "log", "replay", str(log_path)], capture_output=True, text=True, check=False)
    return LogReplay(done.returncode, done.stdout.strip() or done.stderr.strip())

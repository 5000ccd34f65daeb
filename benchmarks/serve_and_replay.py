"""Starts `sagellm serve`, sends it traces, and says what its clients saw and whether the log replays.

    python benchmarks/serve_and_replay.py --cluster h200x1 --load azure-conv:16:300 --load azure-code:3:150

Each ``--load`` is TRACE:REQUESTS_PER_S:NUM_REQUESTS. Weights
are drawn at random. All runs go to one server, one after the other; its log is then replayed through
fresh machines. Prints a table, and writes everything to ``--json``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

READY_S = 900.0
SAGELLM = (sys.executable, "-m", "sagellm")


@dataclass(frozen=True, slots=True)
class Load:
    """One replay against the server."""

    trace: str
    requests_per_s: float
    num_requests: int


def parse_load(text: str) -> Load:
    """``TRACE:REQUESTS_PER_S:NUM_REQUESTS``; raises ValueError for anything else."""
    parts = text.rsplit(":", 2)
    if len(parts) != 3:
        raise ValueError(f"--load: {text!r}, must be TRACE:REQUESTS_PER_S:NUM_REQUESTS")
    return Load(parts[0], float(parts[1]), int(parts[2]))


def start_server(arguments: argparse.Namespace, log_path: Path) -> subprocess.Popen[bytes]:
    command = [*SAGELLM, "serve", "--cluster", arguments.cluster, "--load-format", "dummy"]
    command += ["--port", str(arguments.port), "--log", str(log_path), *arguments.serve_option]
    if arguments.model:
        command += ["--model", arguments.model]
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


def replay_on(base_url: str, load: Load, json_path: Path) -> dict[str, object]:
    command = [*SAGELLM, "replay", load.trace, "--on", base_url, "--rate", str(load.requests_per_s)]
    command += ["--limit", str(load.num_requests), "--json", str(json_path)]
    subprocess.run(command, check=True)
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


def log_replays(log_path: Path) -> str:
    done = subprocess.run([*SAGELLM, "log", "replay", str(log_path)], capture_output=True, text=True, check=False)
    return f"exit code {done.returncode}: {done.stdout.strip() or done.stderr.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="cpu-toy")
    parser.add_argument("--model", default="")
    parser.add_argument("--load", action="append", type=parse_load, default=[])
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-option", action="append", default=[], help="passed on to `sagellm serve`")
    arguments = parser.parse_args()
    base_url = f"http://127.0.0.1:{arguments.port}"
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "run.jsonl"
        server = start_server(arguments, log_path)
        try:
            ready_s = wait_until_ready(server, base_url)
            print(f"ready after {ready_s:.1f} s", flush=True)
            runs = [
                {"load": asdict(load), "result": replay_on(base_url, load, Path(folder) / f"{index}.json")}
                for index, load in enumerate(arguments.load)
            ]
            metrics = core_share(base_url)
        finally:
            exit_code = stop(server) if server.poll() is None else server.returncode
        log_size = log_path.stat().st_size
        replayed = log_replays(log_path)
    print(metrics)
    print(f"server: exit code {exit_code}; log of {log_size / 1e6:.1f} MB, replayed: {replayed}", flush=True)
    if arguments.json:
        report = {"ready_s": ready_s, "runs": runs, "metrics": metrics, "exit_code": exit_code, "replayed": replayed}
        arguments.json.write_text(json.dumps(report | {"cores": os.cpu_count()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

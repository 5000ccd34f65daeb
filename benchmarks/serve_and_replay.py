"""Starts `sagellm serve`, sends it traces, and says what its clients saw and whether the log replays.

    python -m benchmarks.serve_and_replay --cluster h200x1 --load azure-conv:16:300 --load azure-code:3:150

Each ``--load`` is TRACE:REQUESTS_PER_S:NUM_REQUESTS. Weights
are drawn at random. All runs go to one server, one after the other; its log is then replayed through
fresh machines. Prints a table, and writes everything to ``--json``.
"""

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.running_server import Served, core_share, log_replays, replay_on, running_server, wait_until_ready


@dataclass(frozen=True, slots=True)
class Load:
    """One replay against the server."""

    trace: str
    requests_per_s: float
    num_requests: int

    @property
    def options(self) -> tuple[str, ...]:
        return ("--rate", str(self.requests_per_s), "--limit", str(self.num_requests))


def parse_load(text: str) -> Load:
    """``TRACE:REQUESTS_PER_S:NUM_REQUESTS``; raises ValueError for anything else."""
    parts = text.rsplit(":", 2)
    if len(parts) != 3:
        raise ValueError(f"--load: {text!r}, must be TRACE:REQUESTS_PER_S:NUM_REQUESTS")
    return Load(parts[0], float(parts[1]), int(parts[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="cpu-toy")
    parser.add_argument("--model", default="")
    parser.add_argument("--load", action="append", type=parse_load, default=[])
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve-option", action="append", default=[], help="passed on to `sagellm serve`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "run.jsonl"
        served = Served(
            arguments.cluster, log_path, arguments.model, arguments.port, options=tuple(arguments.serve_option)
        )
        with running_server(served) as server:
            ready_s = wait_until_ready(server, served.base_url)
            print(f"ready after {ready_s:.1f} s", flush=True)
            runs = [
                {
                    "load": asdict(load),
                    "result": replay_on(served.base_url, load.trace, Path(folder) / f"{index}.json", load.options),
                }
                for index, load in enumerate(arguments.load)
            ]
            metrics = core_share(served.base_url)
        log_size = log_path.stat().st_size
        replayed = str(log_replays(log_path))
    print(metrics)
    print(f"server: exit code {server.returncode}; log of {log_size / 1e6:.1f} MB, replayed: {replayed}", flush=True)
    if arguments.json:
        report = {"ready_s": ready_s, "runs": runs, "metrics": metrics, "exit_code": server.returncode}
        arguments.json.write_text(
            json.dumps(report | {"replayed": replayed, "cores": os.cpu_count()}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()

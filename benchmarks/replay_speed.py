"""How fast `sagellm replay` is, as a whole process, from its start to its end.

    python benchmarks/replay_speed.py [--runs N] [--only NAME]... [--json FILE]

The trace is Azure's conversation trace of 2023 (19,366 requests); with more instances requests arrive
so many times as fast, so that each instance keeps its load. Each case runs ``--runs`` times, and the
median counts. The cases ``... --json`` write the JSON file too, for which the log is hashed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sagellm.cluster.named_files import named_cluster_text

TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / "azure2023_conv.csv"
INSTANCE_RATE_RPS = 5.53  # of the generator azure-conv, for one instance
BASE_CLUSTER = "h200x1"


@dataclass(frozen=True, slots=True)
class Case:
    """One command line, without the outputs that it writes."""

    name: str
    num_instances: int
    arguments: tuple[str, ...]
    writes_json: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """One process."""

    wall_s: float
    cpu_s: float
    peak_rss_mib: float


@dataclass(frozen=True, slots=True)
class Result:
    """The runs of one case. The forward passes are those that its JSON file reports."""

    name: str
    num_runs: int
    median_wall_s: float
    fastest_wall_s: float
    slowest_wall_s: float
    median_cpu_s: float  # less at the mercy of what else runs on the machine
    num_requests: int
    num_forward_passes: int
    requests_per_s: float
    forward_passes_per_s: float
    peak_rss_mib: float
    load_average: float  # over the last minute, when the case was done


Counts = tuple[int, int]
"""Requests and forward passes of a run."""


def cases() -> list[Case]:
    trace = str(TRACE)
    found = [Case("start-up: one request", 1, ("azure-conv", "--limit", "1"))]
    for num_instances in (1, 4, 16):
        name = f"{num_instances} instance{'s' if num_instances > 1 else ''}"
        arguments = (trace, "--rate-scale", str(num_instances))
        found.append(Case(name, num_instances, arguments))
        found.append(Case(f"{name}, --json", num_instances, arguments, writes_json=True))
    rate = f"{64 * INSTANCE_RATE_RPS:g}"
    found.append(Case("64 instances, 100,000 requests", 64, ("azure-conv", "--limit", "100000", "--rate", rate)))
    found.append(Case("1 instance, --no-fast-forward", 1, (trace, "--no-fast-forward")))
    return found


def measure(case: Case, num_runs: int, folder: Path, counts: dict[tuple[str, ...], Counts]) -> Result:
    """Run a case so often. What ``counts`` has not got yet takes one more run, which is not timed."""
    cluster = folder / f"h200x{case.num_instances}.yaml"
    text = named_cluster_text(BASE_CLUSTER).replace("count: 1", f"count: {case.num_instances}")
    assert f"count: {case.num_instances}\n" in text, f"{BASE_CLUSTER} has no count to change"
    cluster.write_text(text, encoding="utf-8")
    json_file = folder / "result.json"
    command = [sys.executable, "-m", "sagellm", "replay", *case.arguments, "--cluster", str(cluster)]
    with_json = [*command, "--json", str(json_file)]
    samples = [run_process(with_json if case.writes_json else command) for _ in range(num_runs)]
    if case.arguments not in counts:
        run_process(with_json)
        counts[case.arguments] = read_counts(json_file)
    num_requests, num_forward_passes = counts[case.arguments]
    walls_s = [sample.wall_s for sample in samples]
    median_s = statistics.median(walls_s)
    return Result(
        name=case.name,
        num_runs=num_runs,
        median_wall_s=median_s,
        fastest_wall_s=min(walls_s),
        slowest_wall_s=max(walls_s),
        median_cpu_s=statistics.median(sample.cpu_s for sample in samples),
        num_requests=num_requests,
        num_forward_passes=num_forward_passes,
        requests_per_s=num_requests / median_s,
        forward_passes_per_s=num_forward_passes / median_s,
        peak_rss_mib=max(sample.peak_rss_mib for sample in samples),
        load_average=os.getloadavg()[0],
    )


def read_counts(json_file: Path) -> Counts:
    (run,) = json.loads(json_file.read_text(encoding="utf-8"))["runs"]
    assert run["completed"] == run["num_requests"], f"{run['failed']} failed, {run['rejected']} rejected"
    return run["num_requests"], run["num_steps"]


def run_process(command: Sequence[str]) -> Sample:
    """Run to the end. Raises CalledProcessError where it fails."""
    with tempfile.TemporaryFile() as errors:
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, stderr=errors.read().decode())
    kib_per_unit = 1 if sys.platform == "linux" else 1 / 1024
    return Sample(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * kib_per_unit / 1024)


def cpu_model() -> str:
    """As Linux names it; elsewhere, as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def heading() -> str:
    return (
        f"{'':<32}{'runs':>5}{'wall s':>8}{'spread':>13}{'CPU s':>8}{'requests/s':>11}{'passes/s':>11}"
        f"{'RSS MiB':>9}{'load':>6}"
    )


def row(result: Result) -> str:
    spread = f"{result.fastest_wall_s:.2f}-{result.slowest_wall_s:.2f}"
    return (
        f"{result.name:<32}{result.num_runs:>5}{result.median_wall_s:>8.2f}{spread:>13}{result.median_cpu_s:>8.2f}{result.requests_per_s:>11,.0f}"
        f"{result.forward_passes_per_s:>11,.0f}{result.peak_rss_mib:>9,.0f}{result.load_average:>6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--only", action="append", metavar="NAME", help="cases whose name has this in it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "python": platform.python_version()}
    print(f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; one process, one core")
    print(heading())
    results: list[Result] = []
    counts: dict[tuple[str, ...], Counts] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if options.only and not any(part in case.name for part in options.only):
                continue
            results.append(measure(case, options.runs, Path(folder), counts))
            print(row(results[-1]), flush=True)
    by_name = {result.name: result for result in results}
    on, off = by_name.get("1 instance"), by_name.get("1 instance, --no-fast-forward")
    if on is not None and off is not None:
        print(f"fast-forward: {off.median_wall_s / on.median_wall_s:.1f} times as fast as without")
    if options.json is not None:
        document = {"schema": 1, "machine": machine, "cases": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

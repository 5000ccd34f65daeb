"""How well the simulator predicts a server on this CPU, with a profile that is fitted to it here and now.

    python benchmarks/cpu_prediction.py --model sagellm/toy [--shrink N] [--json FILE] [--folder FOLDER]

1. ``python -m sim.calibration measure`` times the executor's own steps and fits a profile.
2. A server is calibrated: 32 streams at once, then requests one after the other, then Poisson arrivals.
   ``python -m sim.calibration serving`` adds what serving adds. The 32 streams give tokens/s, TTFT and
   the core's share of a step.
3. The prediction: 200 other requests (another seed) are sent to a new server and to the simulator.
4. The executor is measured once more: what has changed since is the machine's drift, and no error of a
   prediction.

Lengths are those of the Azure 2023 conversation trace, divided by ``--shrink``; the rate of arrivals is
``--load`` times what the 32 streams reached. One torch thread, so that a core is left for the front and
the client. Definitions: TTFT is first token minus sending, TPOT (E2E - TTFT) / (output tokens - 1).
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from backends.profile_files import read_profile
from sagellm.cost_model.profile import FittedProfile
from traces.generators.generate import generate
from traces.request_trace import Trace, TraceRequest
from traces.writer import write_trace

LIMIT = 0.10
FIGURES = tuple(
    f"{statistic}_{metric}_ms" for metric in ("ttft", "tpot", "e2el") for statistic in ("mean", "median", "p90")
)
NUM_STREAMS = 32
NUM_ALONE = 20
NUM_CALIBRATION = 100
NUM_PREDICTED = 200
GAP_NS = 50_000_000
READY_S = 300.0
CALIBRATION_SEED, PREDICTION_SEED = 1, 2
CLUSTER_TEXT = """\
name: cpu-here
model: {model}
instances:
  - profile: {profile}
    max_num_seqs: {max_num_seqs}
    max_num_batched_tokens: {max_num_batched_tokens}
    kv_tokens: {kv_tokens}
"""


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of one model. Relative errors are simulated / served - 1."""

    model: str
    streams: dict[str, float]  # with 32 at once
    core_us_per_step: float
    core_share: float  # of the time in which the instance had work
    rate: float
    served: dict[str, float]
    simulated: dict[str, float]
    errors: dict[str, float]
    drift: dict[str, float]  # prices measured after / before - 1
    passes: bool


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = predict(options, folder)
    print(_text(result))
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return 0 if result.passes else 1


def predict(options: argparse.Namespace, folder: Path) -> Result:
    before, served_profile, after = folder / "before.json", folder / "served.json", folder / "after.json"
    _measure(options, before)
    cluster = _write_cluster(options, before, folder / "calibrated.yaml")
    streams, core_us, core_share = _calibrate(options, folder, cluster, before, served_profile)
    rate = options.load * streams["request_throughput"]
    trace = folder / "predicted.jsonl"
    write_trace(_poisson(NUM_PREDICTED, PREDICTION_SEED, rate, options.shrink), trace)
    cluster = _write_cluster(options, served_profile, folder / "predicted.yaml")
    out = folder / "predicted.json"
    with _server(options, cluster, None) as url:
        _sagellm("replay", trace, "--on", "sim", "--cluster", cluster, "--on", url, "--json", out)
    report = json.loads(out.read_text())
    simulated, served = report["runs"]
    errors = {figure: report["differences"][0]["relative"][figure] for figure in FIGURES}
    _measure(options, after)
    return Result(
        model=options.model,
        streams=streams,
        core_us_per_step=core_us,
        core_share=core_share,
        rate=rate,
        served={figure: served[figure] for figure in FIGURES},
        simulated={figure: simulated[figure] for figure in FIGURES},
        errors=errors,
        drift=_drift(before, after),
        passes=all(abs(error) <= LIMIT for error in errors.values()) and served["completed"] == NUM_PREDICTED,
    )


def _calibrate(
    options: argparse.Namespace, folder: Path, cluster: Path, before: Path, out: Path
) -> tuple[dict[str, float], float, float]:
    """The profile with what serving adds; figures of 32 streams; the core's microseconds and share of a step."""
    log, poisson = folder / "calibration.log.jsonl", folder / "calibration.jsonl"
    alone, alone_out = folder / "alone.jsonl", folder / "alone.csv"
    streams_trace, streams_out = folder / "streams.jsonl", folder / "streams.json"
    write_trace(_streams(options.shrink), streams_trace)
    write_trace(_alone(options.shrink), alone)
    with _server(options, cluster, log) as url:
        # The first run on a server also wakes up what no later one pays for.
        _sagellm("replay", streams_trace, "--on", url, "--limit", NUM_STREAMS)
        began = _core_counters(url)
        _sagellm("replay", streams_trace, "--on", url, "--json", streams_out)
        ended = _core_counters(url)
        (streams,) = json.loads(streams_out.read_text())["runs"]
        _sagellm("replay", alone, "--on", url, "--requests", alone_out)
        rate = options.load * streams["request_throughput"]
        write_trace(_poisson(NUM_CALIBRATION, CALIBRATION_SEED, rate, options.shrink), poisson)
        _sagellm("replay", poisson, "--on", url)
    fit = ("--profile", before, "--cluster", cluster, "--trace", alone, "--log", log, "--requests", alone_out)
    _python("-m", "sim.calibration", "serving", *fit, "--out", out)
    core_s, num_steps = (end - begin for begin, end in zip(began, ended, strict=True))
    names = (*FIGURES, "output_throughput", "request_throughput", "duration_s")
    return {name: streams[name] for name in names}, 1e6 * core_s / num_steps, core_s / streams["duration_s"]


def _streams(shrink: int) -> Trace:
    """32 clients, each sending its next request when it has the answer to the one before."""
    requests = _poisson(4 * NUM_STREAMS, CALIBRATION_SEED, 1.0, shrink).requests
    chained = [
        replace(request, arrival_ns=0, previous=index - NUM_STREAMS if index >= NUM_STREAMS else None, gap_ns=0)
        for index, request in enumerate(requests)
    ]
    return Trace("streams", tuple(chained))


def _alone(shrink: int) -> Trace:
    """Requests of which each is sent when the one before it has been over for a while."""
    requests = _poisson(NUM_ALONE, CALIBRATION_SEED, 1.0, shrink).requests
    chained = [
        replace(request, arrival_ns=0, previous=index - 1 if index else None, gap_ns=GAP_NS)
        for index, request in enumerate(requests)
    ]
    return Trace("alone", tuple(chained))


def _poisson(num_requests: int, seed: int, rate: float, shrink: int) -> Trace:
    return _shrunk(generate("poisson", num_requests=num_requests, seed=seed, rate=rate), shrink)


def _shrunk(trace: Trace, shrink: int) -> Trace:
    def one(request: TraceRequest) -> TraceRequest:
        return replace(
            request,
            num_prompt_tokens=max(1, request.num_prompt_tokens // shrink),
            num_output_tokens=max(2, request.num_output_tokens // shrink),
        )

    return replace(trace, requests=tuple(one(request) for request in trace.requests))


def _drift(before: Path, after: Path) -> dict[str, float]:
    """How prices of three kinds of steps have changed."""
    first, last = read_profile(before), read_profile(after)
    assert isinstance(first, FittedProfile)
    assert isinstance(last, FittedProfile)
    return {
        "one decode": last.table.decode_base_fs[0] / max(1, first.table.decode_base_fs[0]) - 1,
        "most decodes": last.table.decode_base_fs[-1] / max(1, first.table.decode_base_fs[-1]) - 1,
        "longest chunk": last.table.mixed_base_fs[-1] / max(1, first.table.mixed_base_fs[-1]) - 1,
    }


# --- processes ------------------------------------------------------------------------------------------


def _measure(options: argparse.Namespace, out: Path) -> None:
    sizes = ("max_num_seqs", "max_num_batched_tokens", "kv_tokens", "request_tokens_max", "case_tokens_max", "rounds")
    given = [word for name in sizes for word in (f"--{name.replace('_', '-')}", getattr(options, name))]
    _python("-m", "sim.calibration", "measure", "--model", options.model, "--num-threads", 1, *given, "--out", out)


def _write_cluster(options: argparse.Namespace, profile: Path, path: Path) -> Path:
    path.write_text(
        CLUSTER_TEXT.format(
            model=options.model,
            profile=profile,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            kv_tokens=options.kv_tokens,
        ),
        encoding="utf-8",
    )
    return path


@contextmanager
def _server(options: argparse.Namespace, cluster: Path, log: Path | None) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sagellm", "serve", "--cluster", str(cluster), "--backend", "cpu"]
    command += ["--load-format", "dummy", "--num-threads", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += [] if log is None else ["--log", str(log)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_until_ready(server, f"http://127.0.0.1:{port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str) -> None:
    give_up_s = time.monotonic() + READY_S
    while time.monotonic() < give_up_s:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server was not ready within {READY_S:g} s")


def _core_counters(url: str) -> tuple[float, float]:
    """Seconds that instances have spent on decisions, and their steps, when what they last said has arrived."""
    time.sleep(1.5)
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    return total("sagellm:instance_core_seconds_total"), total("sagellm:instance_steps_total")


def _sagellm(*arguments: object) -> None:
    _python("-m", "sagellm", *arguments)


def _python(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ python {' '.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr, env={**os.environ})


def _text(result: Result) -> str:
    rows = [f"{result.model}, {NUM_PREDICTED} requests at {result.rate:.2f} requests/s", ""]
    rows.append(f"{'':<12}{'served':>12}{'simulated':>12}{'error':>10}")
    for figure in FIGURES:
        statistic, metric, _ = figure.split("_")
        values = f"{result.served[figure]:>12.2f}{result.simulated[figure]:>12.2f}{result.errors[figure]:>+10.1%}"
        rows.append(f"{metric.upper():<5} {statistic:<6}{values}")
    streams = result.streams
    rows += [
        "",
        f"{NUM_STREAMS} streams: {streams['output_throughput']:.0f} output tokens/s, TTFT p50 "
        f"{streams['median_ttft_ms']:.0f} ms, TPOT p50 {streams['median_tpot_ms']:.2f} ms",
        f"core: {result.core_us_per_step:.0f} us a step, {result.core_share:.1%} of the time",
        "drift: " + ", ".join(f"{name} {change:+.1%}" for name, change in result.drift.items()),
        f"within {LIMIT:.0%}: {'yes' if result.passes else 'no'}",
    ]
    return "\n".join(rows)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sagellm/toy")
    parser.add_argument("--shrink", type=int, default=8, help="lengths of the trace are divided by this")
    parser.add_argument("--load", type=float, default=0.6, help="of what 32 streams reach")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-tokens", type=int, default=65536)
    parser.add_argument("--request-tokens-max", type=int, default=1024)
    parser.add_argument("--case-tokens-max", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep all files here")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

r"""How well the simulator predicts a server on this CPU, with a profile that is fitted to it here and now.

    python benchmarks/cpu_prediction.py --model sagellm/toy --repetitions 5 [--json FILE] [--profile-out cpu_toy.json]
    python benchmarks/cpu_prediction.py --model sagellm/qwen3-100m --shrink-prompts 64 --shrink-outputs 24 \
        --num-calibration 60

One server with a log, one torch thread, and one client, whose replays take turns:

1. 32 streams at once: tokens/s, TTFT, and the core's share of the time.
2. Calibration: requests at a few rates around that of the prediction, each time another seed.
3. Prediction: 200 requests of a seed that no calibration uses; 2 and 3 several times over, and 2 once more.

A profile is fitted to the log of the calibrations alone (``sim.calibration``), and the 200 requests are
simulated with it. A figure of the server is the median of its repetitions. The second error is the median of
those of the repetitions, each against prices that are scaled to the two calibrations around it: a machine
that is slower at one time than at another makes the two errors differ. Also shown is what steps of each replay
took longer than the profile says, and what others used of the machine meanwhile.

Lengths are those of the Azure 2023 conversation trace, divided so that the 200 requests take about a minute;
the rate of arrivals is ``--load`` times what the 32 streams reached, low enough that server and client leave
some of two cores unused. Definitions: TTFT is first token minus sending, TPOT (E2E - TTFT) / (output tokens - 1).
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from sagellm.cluster.build import build_cluster
from sagellm.cluster.description import ClusterDescription, InstanceGroup
from sagellm.cost_model.profile import FittedProfile
from sagellm.load_client.endpoint import Endpoint
from sagellm.load_client.replay_on_server import LoadSettings, replay_on_server
from sim.calibration.measured_profile import measured_profile
from sim.calibration.profile_writer import write_profile
from sim.calibration.served_log import LoggedReplay, read_replays
from sim.calibration.serving_command import serving_measurement
from sim.calibration.serving_fit import ServedReplay, ServingFit, adjusted, fit_serving, time_ratio
from sim.cluster_file import sim_cluster
from sim.replay import replay
from sim.report.statistics import Distribution
from sim.report.summary import RunSummary, summarise
from traces.generators.generate import generate
from traces.request_trace import Trace, TraceRequest

LIMIT = 0.10
DEVICE_PROFILE = "cpu/spec"
NUM_STREAMS = 32
NUM_PREDICTED = 200
CALIBRATION_RATES = (1.0, 0.7, 1.3)  # of the prediction's, in turn
READY_S = 300.0
QUIET_CORES = 0.2  # that others may use
LOG_S = 1.5  # within which a server writes what it keeps of its log, and says how it is
CALIBRATION_SEED, PREDICTION_SEED = 1, 1000
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sent:
    """One replay on the server, by the nonce of its requests. Processor time is in cores, on average."""

    nonce: str
    summary: RunSummary
    ttft_ms: dict[int, float]
    server_cores: float
    client_cores: float
    other_cores: float  # what anybody else on this machine used meanwhile


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of one model. Relative errors are simulated / served - 1."""

    model: str
    shrink: tuple[int, int]  # prompts and outputs
    hardware: str
    output_tokens_per_s: float  # of 32 streams, as the rest up to the core's share
    streams: dict[str, float]
    core_us_per_step: float
    core_share: float
    rate: float  # of the prediction's arrivals, a second
    repetitions: list[dict[str, float]]
    served: dict[str, float]  # medians of the repetitions
    simulated: dict[str, float]
    errors: dict[str, float]
    errors_around: dict[str, float]  # medians over repetitions, each against the calibrations around it
    steps_took: dict[str, float]  # by replay: their time over what the table says
    cores: dict[str, tuple[float, float, float]]  # by replay: server, client, others
    fit_error: str
    request_us: float
    duration_s: float
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
    started_s = time.monotonic()
    log = folder / "server.log.jsonl"
    with _server(options, folder, log) as server:
        server.send("warmup", _streams(options, NUM_STREAMS))
        core_before = server.core_counters()
        streams = server.send("streams", _streams(options, 4 * NUM_STREAMS))
        core_s, num_steps = (end - begin for begin, end in zip(core_before, server.core_counters(), strict=True))
        assert streams.summary.request_throughput is not None
        assert streams.summary.duration_s is not None
        rate = options.load * streams.summary.request_throughput
        predicted = _poisson(options, NUM_PREDICTED, PREDICTION_SEED, rate)
        calibrations, predictions = _take_turns(options, server, predicted, rate)
    logged = read_replays(log)
    replays = [ServedReplay(logged[sent.nonce], sent.ttft_ms) for sent in calibrations]
    fit = fit_serving(replays)
    profile = _profile(options, fit)
    simulated = _simulated(options, profile, options.profile_out or folder / "profile.json", predicted)
    repetitions = [_figures(sent.summary) for sent in predictions]
    served = {figure: statistics.median(each[figure] for each in repetitions) for figure in simulated}
    errors = {figure: simulated[figure] / served[figure] - 1 for figure in simulated}
    around = [
        _simulated(options, _profile(options, adjusted(fit, pair)), folder / f"profile{turn}.json", predicted)
        for turn, pair in enumerate(pairwise(replays))
    ]
    everything = [streams, *(sent for pair in zip(calibrations, predictions, strict=False) for sent in pair)]
    everything.append(calibrations[-1])
    return Result(
        model=options.model,
        shrink=(options.shrink_prompts, options.shrink_outputs),
        hardware=profile.header.hardware,
        output_tokens_per_s=streams.summary.output_throughput or 0.0,
        streams=_figures(streams.summary),
        core_us_per_step=1e6 * core_s / num_steps,
        core_share=core_s / streams.summary.duration_s,
        rate=rate,
        repetitions=repetitions,
        served=served,
        simulated=simulated,
        errors=errors,
        errors_around={
            figure: statistics.median(a[figure] / b[figure] - 1 for a, b in zip(around, repetitions, strict=True))
            for figure in simulated
        },
        steps_took={sent.nonce: _time_ratio(profile, logged[sent.nonce]) for sent in everything},
        cores={sent.nonce: (sent.server_cores, sent.client_cores, sent.other_cores) for sent in everything},
        fit_error=profile.header.fit_error,
        request_us=fit.request_us,
        duration_s=time.monotonic() - started_s,
        passes=all(abs(error) <= LIMIT for error in errors.values())
        and all(sent.summary.completed == NUM_PREDICTED for sent in predictions),
    )


def _take_turns(
    options: argparse.Namespace, server: "Server", predicted: Trace, rate: float
) -> tuple[list[Sent], list[Sent]]:
    """Calibration, prediction, calibration, and so on, so that what changes over minutes is in both."""
    calibrations, predictions = [], []
    for turn in range(options.repetitions + 1):
        seed, own_rate = CALIBRATION_SEED + turn, rate * CALIBRATION_RATES[turn % len(CALIBRATION_RATES)]
        trace = _poisson(options, options.num_calibration, seed, own_rate)
        calibrations.append(server.send(f"calibration{turn}", trace))
        if turn < options.repetitions:
            predictions.append(server.send(f"prediction{turn}", predicted))
    return calibrations, predictions


def _profile(options: argparse.Namespace, fit: ServingFit) -> FittedProfile:
    measurement = serving_measurement(options.model, "cpu", DEVICE_PROFILE, 1, fit)
    profile = measured_profile(measurement, fit.table, round(fit.request_us * 1e3))
    if options.profile_out is None:
        return profile
    name = options.profile_out.stem.replace("_", "/", 1)  # as files of shipped profiles are named
    return replace(profile, header=replace(profile.header, name=name))


def _simulated(options: argparse.Namespace, profile: FittedProfile, path: Path, trace: Trace) -> dict[str, float]:
    """The figures of the trace with that profile, which is left at ``path``."""
    write_profile(profile, path)
    cluster = sim_cluster(build_cluster(_cluster(options, str(path))))
    return _figures(summarise(replay(cluster, trace).metrics, {}))


def _time_ratio(profile: FittedProfile, logged: LoggedReplay) -> float:
    return time_ratio(profile.table, logged.steps)


def _figures(summary: RunSummary) -> dict[str, float]:
    figures = {}
    for name in ("ttft", "tpot", "e2el"):
        distribution = getattr(summary, name)
        assert isinstance(distribution, Distribution)
        for statistic in ("mean", "median", "p90"):
            figures[f"{statistic}_{name}_ms"] = getattr(distribution, f"{statistic}_ms")
    return figures


# --- traces ---------------------------------------------------------------------------------------------


def _streams(options: argparse.Namespace, num_requests: int) -> Trace:
    """32 clients, each sending its next request when it has the answer to the one before."""
    requests = _poisson(options, num_requests, CALIBRATION_SEED, 1.0).requests
    chained = [
        replace(request, arrival_ns=0, previous=index - NUM_STREAMS if index >= NUM_STREAMS else None, gap_ns=0)
        for index, request in enumerate(requests)
    ]
    return Trace("streams", tuple(chained))


def _poisson(options: argparse.Namespace, num_requests: int, seed: int, rate: float) -> Trace:
    def shrunk(request: TraceRequest) -> TraceRequest:
        return replace(
            request,
            num_prompt_tokens=max(1, request.num_prompt_tokens // options.shrink_prompts),
            num_output_tokens=max(2, request.num_output_tokens // options.shrink_outputs),
        )

    trace = generate("poisson", num_requests=num_requests, seed=seed, rate=rate)
    return replace(trace, requests=tuple(shrunk(request) for request in trace.requests))


# --- the server -----------------------------------------------------------------------------------------


class Server:
    """A server process that is up, and what it and its instance use of the processor."""

    def __init__(self, process_id: int, url: str) -> None:
        self._url = url
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
        self._process_ids = [process_id, *map(int, children)]

    def send(self, nonce: str, trace: Trace) -> Sent:
        print(f"{nonce}: {len(trace.requests)} requests", file=sys.stderr, flush=True)
        began = self._processor_s()
        result = replay_on_server(LoadSettings(Endpoint(self._url), nonce=nonce), trace)
        server_s, client_s, all_s = (end - begin for begin, end in zip(began, self._processor_s(), strict=True))
        records = result.metrics.requests.items()
        ttft_ms = {int(index): record.ttft_ns / 1e6 for index, record in records if record.ttft_ns is not None}
        time.sleep(LOG_S)
        return Sent(
            nonce,
            summarise(result.metrics, {}),
            ttft_ms,
            server_s / result.wall_s,
            client_s / result.wall_s,
            max(0.0, all_s - server_s - client_s) / result.wall_s,
        )

    def core_counters(self) -> tuple[float, float]:
        """Seconds that instances have spent on decisions, and their steps."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()

        def total(name: str) -> float:
            return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

        return total("sagellm:instance_core_seconds_total"), total("sagellm:instance_steps_total")

    def _processor_s(self) -> tuple[float, float, float]:
        """Of the server's processes, of this one, and of the whole machine."""
        server = 0
        for process_id in self._process_ids:
            fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
            server += int(fields[11]) + int(fields[12])
        # user, nice, system, idle, iowait, irq, softirq, steal
        machine = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = sum(machine) - machine[3] - machine[4]
        return server / CLOCK_TICKS, time.process_time(), busy / CLOCK_TICKS


@contextmanager
def _server(options: argparse.Namespace, folder: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cluster = folder / "cluster.yaml"
    limits = asdict(_cluster(options, DEVICE_PROFILE).instances[0])
    names = ("profile", "max_num_seqs", "max_num_batched_tokens", "kv_tokens")
    cluster.write_text(json.dumps({"model": options.model, "instances": [{name: limits[name] for name in names}]}))
    command = [sys.executable, "-m", "sagellm", "serve", "--cluster", str(cluster), "--backend", "cpu"]
    command += ["--load-format", "dummy", "--num-threads", "1", "--host", "127.0.0.1", "--port", str(port)]
    with subprocess.Popen([*command, "--log", str(log)], stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url)
            yield Server(process.pid, url)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _cluster(options: argparse.Namespace, profile: str) -> ClusterDescription:
    group = InstanceGroup(
        profile,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_tokens=options.kv_tokens,
    )
    return ClusterDescription("cpu-here", options.model, (group,))


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


# --- the command line -------------------------------------------------------------------------------------


def _text(result: Result) -> str:
    rows = [f"{result.model} on {result.hardware}: {NUM_PREDICTED} requests at {result.rate:.2f} a second", ""]
    rows.append(f"{'':<12}{'served':>10}{'simulated':>11}{'error':>9}{'':>6}{'around':>9}{'':>6}  repetitions")
    for figure, simulated in result.simulated.items():
        statistic, metric, _ = figure.split("_")
        values = f"{result.served[figure]:>10.2f}{simulated:>11.2f}"
        for error in (result.errors[figure], result.errors_around[figure]):
            values += f"{error:>+9.1%}{'ok' if abs(error) <= LIMIT else 'MISS':>6}"
        each = " ".join(f"{repetition[figure]:.2f}" for repetition in result.repetitions)
        rows.append(f"{metric.upper():<5} {statistic:<6}{values}  {each}")
    rows += [
        "",
        f"{NUM_STREAMS} streams: {result.output_tokens_per_s:.0f} output tokens/s, TTFT p50 "
        f"{result.streams['median_ttft_ms']:.1f} ms, TPOT p50 {result.streams['median_tpot_ms']:.2f} ms",
        f"core: {result.core_us_per_step:.0f} us a step, {result.core_share:.2%} of the time",
        f"a request on its way in and out: {result.request_us:.0f} us",
        f"fit: {result.fit_error}",
        "",
        f"{'replay':<14}{'steps over table':>17}{'server':>8}{'client':>8}{'others':>8}  (cores)",
    ]
    for nonce, ratio in result.steps_took.items():
        server, client, others = result.cores[nonce]
        rows.append(f"{nonce:<14}{ratio - 1:>+17.1%}{server:>8.2f}{client:>8.2f}{others:>8.2f}")
    most = max(others for _, _, others in result.cores.values())
    if most > QUIET_CORES:
        rows.append(f"disturbed: others used up to {most:.2f} cores; on a quiet machine it is next to none")
    rows.append(f"within {LIMIT:.0%}: {'yes' if result.passes else 'no'} ({result.duration_s:.0f} s)")
    return "\n".join(rows)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sagellm/toy")
    parser.add_argument("--shrink-prompts", type=int, default=4, help="the trace's prompts are divided by this")
    parser.add_argument("--shrink-outputs", type=int, default=4, help="and its outputs by this")
    parser.add_argument("--load", type=float, default=0.4, help="of what 32 streams reach")
    parser.add_argument("--repetitions", type=int, default=3, help="of the predicted replay")
    parser.add_argument("--num-calibration", type=int, default=100, help="requests of each calibration")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--kv-tokens", type=int, default=65536)
    parser.add_argument("--folder", type=Path, help="keep all files here")
    parser.add_argument("--profile-out", type=Path, metavar="PROFILE", help="keep the fitted profile here")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Online serving through HTTP on one card, beside vLLM 0.22.1 on the same kind of card.

    python -m benchmarks.h200.serve_online OUT.json [--runs 3] [--only conversation-16]...

Starts `sagellm serve` with Qwen2.5-7B's shape, random weights and the cluster ``h200x1-sagellm``, and sends it
three loads, one after the other, each ``--runs`` times: the first 600 requests of the Azure conversation trace at 16
requests/s, the same at 32, and the first 600 of the code trace at 6, which come in bursts. Lengths and arrivals are
those that vLLM's own runs had (``--conversation``, ``--code``: their CSV files). A short load that is not recorded
comes first. At the end the server's log is replayed through fresh machines. Prints every run, their median, and vLLM's
figures. A run takes as long as its load lasts and its last answer takes: about 45, 30 and 110 s.

    python -m benchmarks.h200.serve_online OUT.json --cluster cpu-toy --limit 20 --runs 1

tries it without a card; vLLM's figures are then left out.

With ``--keep FOLDER`` the server's log and what the clients saw of each request stay there, in the order in which
`python -m sim.calibration serving` takes them to fit a profile:

    python -m sim.calibration serving --backend cuda --model Qwen/Qwen2.5-7B --device-profile h200/spec \
        --log FOLDER/run.jsonl $(printf -- "--requests %s " FOLDER/*.csv) --out PROFILE
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.running_server import Served, core_share, log_replays, replay_on, running_server, wait_until_ready

DATA_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "h200"
SERVING_CLUSTER = "h200x1-sagellm"
WARM_UP_REQUESTS = 20
WARM_UP_REQUESTS_PER_S = 16


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a run: its key in the JSON of `sagellm replay`, and how it is shown and compared."""

    key: str
    name: str
    decimals: int
    is_larger_better: bool = False

    def keeps(self, value: float, limit: float) -> bool:
        """As exactly as the limit is known, which is to the decimals shown."""
        shown = round(value, self.decimals)
        return shown >= limit if self.is_larger_better else shown <= limit


FIGURES = (
    Figure("median_ttft_ms", "TTFT p50, ms", 1),
    Figure("p90_ttft_ms", "TTFT p90, ms", 1),
    Figure("p99_ttft_ms", "TTFT p99, ms", 1),
    Figure("median_tpot_ms", "TPOT p50, ms", 2),
    Figure("p90_tpot_ms", "TPOT p90, ms", 2),
    Figure("p99_tpot_ms", "TPOT p99, ms", 2),
    Figure("output_throughput", "output tokens/s", 0, is_larger_better=True),
)


@dataclass(frozen=True, slots=True)
class OnlineCase:
    """One load. ``reference`` holds what to keep, by a figure's key: vLLM's, or what is asked of us."""

    name: str
    trace: str  # the option that names its file
    rate_scale: float
    reference: dict[str, float]


CASES = (
    OnlineCase(
        "conversation-16",
        "conversation",
        1.0,
        {
            "median_ttft_ms": 36.6,
            "p90_ttft_ms": 96.6,
            "p99_ttft_ms": 174.8,
            "median_tpot_ms": 8.01,
            "p90_tpot_ms": 9.67,
            "p99_tpot_ms": 12.82,
            "output_throughput": 3948,
        },
    ),
    OnlineCase("conversation-32", "conversation", 2.0, {"output_throughput": 6300}),
    OnlineCase(
        "code-6",
        "code",
        1.0,
        {
            "median_ttft_ms": 1859,
            "p90_ttft_ms": 6425,
            "p99_ttft_ms": 8146,
            "median_tpot_ms": 171,
            "p90_tpot_ms": 185,
            "p99_tpot_ms": 188,
        },
    ),
)


@dataclass(frozen=True, slots=True)
class OnlineRun:
    """What the clients of one run saw. A run that failed has no figures but says why."""

    case: str
    run: int
    figures: dict[str, float]
    num_requests: int = 0
    num_completed: int = 0
    client_lag_p99_ms: float = 0.0
    failure: str = ""

    @property
    def is_whole(self) -> bool:
        return not self.failure and self.num_completed == self.num_requests


@dataclass(slots=True)
class OnlineReport:
    """What the JSON file holds."""

    cluster: str
    limit: int | None
    ready_s: float
    runs: list[OnlineRun]
    core: str = ""  # the server's own count of what the deciding core took
    log_replay: str = ""
    log_is_equal: bool = False


def main(words: list[str] | None = None) -> int:
    arguments = parse_arguments(words)
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    missing = missing_traces(arguments, chosen)
    if missing:
        print(missing, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = measure(arguments, chosen, arguments.keep or Path(folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
    write(arguments.out, report)
    for case in chosen:
        print_case(case, report)
    print(f"\n{report.core}\nlog replayed: {report.log_replay}", flush=True)
    return 0 if report.log_is_equal and all(run.is_whole for run in report.runs) else 1


def measure(arguments: argparse.Namespace, cases: list[OnlineCase], folder: Path) -> OnlineReport:
    """Raises RuntimeError where the server does not start, or does not serve the warm-up."""
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "run.jsonl"
    options = tuple(arguments.serve_option)
    served = Served(arguments.cluster, log_path, arguments.model, arguments.port, options)
    with running_server(served) as server:
        report = OnlineReport(arguments.cluster, arguments.limit, wait_until_ready(server, served.base_url), [])
        print(f"ready after {report.ready_s:.1f} s", flush=True)
        run_all(arguments, cases, served.base_url, folder, report)
        report.core = core_share(served.base_url) if server.poll() is None else "the server ended early"
    replayed = log_replays(log_path)
    report.log_replay, report.log_is_equal = str(replayed), replayed.is_equal
    return report


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="repeatable")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="only the first requests of each load; vLLM's figures are left out")
    parser.add_argument(
        "--cluster", default=SERVING_CLUSTER, help=f"a file, or a known name (default: {SERVING_CLUSTER})"
    )
    parser.add_argument("--model", default="", help="instead of the cluster's")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the log and the clients' records there")
    parser.add_argument("--serve-option", action="append", default=[], help="passed on to `sagellm serve`")
    for name, file in (("conversation", "conv_16"), ("code", "code_6")):
        default = DATA_FOLDER / f"vllm-0.22.1_qwen2.5-7b_online_{file}.csv"
        parser.add_argument(f"--{name}", type=Path, default=default, help="CSV file of vLLM's run of that trace")
    return parser.parse_args(words)


def missing_traces(arguments: argparse.Namespace, cases: list[OnlineCase]) -> str:
    """A sentence on the first file that is needed and is not there; empty where all are."""
    for case in cases:
        path: Path = getattr(arguments, case.trace)
        if not path.is_file():
            return f"--{case.trace}: {path} is no file; give the CSV file of vLLM's own run, which {case.name} repeats"
    return ""


def run_all(
    arguments: argparse.Namespace, cases: list[OnlineCase], base_url: str, folder: Path, report: OnlineReport
) -> None:
    """The warm-up, then every run of every case; a run that fails is noted, and the next one tried."""
    warm_up = ["--limit", str(WARM_UP_REQUESTS), "--rate", str(WARM_UP_REQUESTS_PER_S)]
    warm_up += ["--requests", str(folder / "00-warm-up.csv")]
    replay_on(base_url, str(getattr(arguments, cases[0].trace)), folder / "warm-up.json", warm_up, is_quiet=True)
    print(f"warmed up by {WARM_UP_REQUESTS} requests", flush=True)
    for case in cases:
        options = ["--rate-scale", str(case.rate_scale)]
        if arguments.limit is not None:
            options += ["--limit", str(arguments.limit)]
        for run in range(1, arguments.runs + 1):
            name = f"{len(report.runs) + 1:02}-{case.name}-{run}"
            recorded = [*options, "--requests", str(folder / f"{name}.csv")]
            trace = str(getattr(arguments, case.trace))
            try:
                document = replay_on(base_url, trace, folder / f"{name}.json", recorded, is_quiet=True)
                report.runs.append(run_of(case.name, run, document))
            except RuntimeError as error:
                report.runs.append(OnlineRun(case.name, run, {}, failure=str(error)))
            print(line_of(report.runs[-1]), flush=True)
            write(arguments.out, report)


def run_of(case: str, run: int, document: dict[str, object]) -> OnlineRun:
    """From the JSON of `sagellm replay`; its one run is that on the server."""
    runs = document["runs"]
    assert isinstance(runs, list), "the JSON of `sagellm replay` lists its runs"
    figures = {figure.key: runs[0][figure.key] for figure in FIGURES if runs[0][figure.key] is not None}
    lag_ms = runs[0]["served"]["p99_client_lag_ms"] or 0.0
    return OnlineRun(case, run, figures, runs[0]["num_requests"], runs[0]["completed"], lag_ms)


def line_of(run: OnlineRun) -> str:
    if run.failure:
        return f"{run.case}, run {run.run}: {run.failure}"
    shown = [f"{run.figures[f.key]:,.{f.decimals}f}" if f.key in run.figures else "-" for f in FIGURES]
    return (
        f"{run.case}, run {run.run}: {run.num_completed} of {run.num_requests} completed; p50/p90/p99 of TTFT "
        f"{'/'.join(shown[:3])}, of TPOT {'/'.join(shown[3:6])} ms; {shown[6]} output tokens/s"
    )


def write(path: Path, report: OnlineReport) -> None:
    """After every run, so that an interrupted one leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


def print_case(case: OnlineCase, report: OnlineReport) -> None:
    runs = [run for run in report.runs if run.case == case.name and run.figures]
    reference = case.reference if report.limit is None else {}
    numbers = "".join(f"{f'run {run.run}':>10}" for run in runs)
    print(f"\n{case.name:18}{numbers}{'median':>10}{'wanted' if reference else '':>10}")
    for figure in FIGURES:
        values = [run.figures[figure.key] for run in runs if figure.key in run.figures]
        if values:
            print(figure_line(figure, values, reference.get(figure.key)))
    print(f"{'completed':18}" + "".join(f"{f'{run.num_completed}/{run.num_requests}':>10}" for run in runs))
    print(f"{'client lag p99, ms':18}" + "".join(f"{run.client_lag_p99_ms:10.1f}" for run in runs))


def figure_line(figure: Figure, values: list[float], limit: float | None) -> str:
    median = statistics.median(values)
    line = f"{figure.name:18}" + "".join(f"{value:10,.{figure.decimals}f}" for value in (*values, median))
    if limit is None:
        return line
    return f"{line}{limit:10,.{figure.decimals}f}  {'met' if figure.keeps(median, limit) else 'missed'}"


if __name__ == "__main__":
    sys.exit(main())
